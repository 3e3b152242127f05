"""Where `up` puts checkpoints: one folder per content and settings, made once, by one process at a time."""

import os
import threading
import time
from dataclasses import replace

import pytest

from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats.errors import ExpertFlowError

shelf_module = pytest.importorskip("expertflow_quant.serve.shelf", exc_type=ImportError)
Recipe, default_shelf, fetch, place = (
    shelf_module.Recipe,
    shelf_module.default_shelf,
    shelf_module.fetch,
    shelf_module.place,
)


@pytest.fixture
def recipe(tmp_path):
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return Recipe(model, "awq", Plan.uniform("int4-g32"))


def test_the_place_tells_model_method_and_format(recipe, tmp_path):
    name = place(tmp_path, recipe).name
    assert name.startswith("a-model-awq-int4-g32-")
    assert place(tmp_path, recipe).name == name


def test_every_setting_and_every_byte_counts(recipe, tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "a.json").write_text("[]")
    seen = {place(tmp_path, recipe)}

    def is_new(other=recipe):
        before = len(seen)
        seen.add(place(tmp_path, other))
        return len(seen) == before + 1

    assert is_new(replace(recipe, method="gptq"))
    assert is_new(replace(recipe, plan=Plan.uniform("int3-g32")))
    assert is_new(replace(recipe, plan=Plan.parse({"default": "int4-g32", "layers": {"0": "int2-g32"}})))
    assert is_new(replace(recipe, samples=samples))
    (samples / "a.json").write_text("[1]")
    assert is_new(replace(recipe, samples=samples))
    (recipe.model / "model.safetensors").write_bytes(b"weightz")
    assert is_new()
    (recipe.model / "tokenizer.json").write_text("{}")
    assert is_new()


def test_what_decides_nothing_does_not_count(recipe, tmp_path):
    before = place(tmp_path, recipe)
    (recipe.model / "README.md").write_text("hello")
    os.utime(recipe.model / "model.safetensors", (1, 1))
    assert place(tmp_path, recipe) == before


def test_a_large_file_counts_by_head_size_and_time(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shelf_module, "_WHOLE", 3)
    before = place(tmp_path, recipe)
    assert place(tmp_path, recipe) == before
    os.utime(recipe.model / "model.safetensors", (1, 1))
    assert place(tmp_path, recipe) != before


def test_made_once_and_then_found(recipe, tmp_path):
    made, said = [], []

    def make(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    folders = [fetch(tmp_path / "shelf", recipe, make, said.append) for _ in range(2)]
    assert folders == made * 2
    assert said == [f"quantized before: {made[0]}"]


def test_an_unfinished_one_is_made_again(recipe, tmp_path):
    def fail(folder):
        folder.mkdir()
        raise ExpertFlowError("disk full")

    with pytest.raises(ExpertFlowError, match="disk full"):
        fetch(tmp_path / "shelf", recipe, fail, print)
    made = []
    fetch(tmp_path / "shelf", recipe, made.append, print)
    assert len(made) == 1


def test_two_at_once_make_it_once(recipe, tmp_path):
    made, said = [], []

    def make(folder):
        time.sleep(0.2)
        folder.mkdir()
        made.append(folder)
        (folder / "manifest.json").write_text("{}")

    shelf = tmp_path / "shelf"
    threads = [threading.Thread(target=fetch, args=(shelf, recipe, make, said.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    assert sum("waiting" in text for text in said) == 2


def test_what_is_no_model_is_refused(recipe, tmp_path):
    with pytest.raises(ExpertFlowError, match="no folder with a config"):
        Recipe(tmp_path / "nowhere", "awq", recipe.plan)
    (recipe.model / "manifest.json").write_text("{}")
    with pytest.raises(ExpertFlowError, match="is quantized already: serve it"):
        replace(recipe)
    (recipe.model / "manifest.json").unlink()
    with pytest.raises(ExpertFlowError, match="--samples"):
        replace(recipe, samples=tmp_path / "nowhere")


def test_the_shelf_follows_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_shelf() == tmp_path / "expertflow-quant"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_shelf() == tmp_path / ".cache" / "expertflow-quant"
