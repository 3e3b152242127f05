"""The shipped models are ordinary transformers folders, loaded and asked without this repository's code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.metrics import anls, relaxed_accuracy
from expertflow_quant.samples import Item, make_items

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "calibration" / "shipped"
CLASSES = {
    "moe": "Qwen3VLMoeForConditionalGeneration",
    "dense": "Qwen3VLForConditionalGeneration",
}
MOST_MIB = 30
ITEMS_OF_A_TASK = 8
LEAST_MEAN_SCORE = 0.8


def test_together_they_are_small() -> None:
    files = [path for name in CLASSES for path in (SHIPPED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_MIB * 2**20


@pytest.mark.parametrize("name", CLASSES)
def test_plain_transformers_loads_it_and_it_reads(name: str, tmp_path: Path) -> None:
    items = [item for task in ("chart", "document") for item in make_items(task, "test", ITEMS_OF_A_TASK, seed=11)]
    printed = ask_plain_transformers(SHIPPED / name, items, tmp_path)
    assert printed["class"] == CLASSES[name]
    scores = [score(item, answer) for item, answer in zip(items, printed["answers"], strict=True)]
    assert sum(scores) / len(scores) >= LEAST_MEAN_SCORE, list(zip(items, printed["answers"], scores, strict=True))


def score(item: Item, answer: str) -> float:
    if item.task == "chart":
        return max(relaxed_accuracy(answer, accepted) for accepted in item.answers)
    return anls(answer, list(item.answers))


def ask_plain_transformers(model: Path, items: list[Item], folder: Path) -> dict:
    questions = []
    for item in items:
        image = folder / f"{len(questions)}.png"
        item.image.save(image)
        questions.append({"image": str(image), "prompt": item.prompt, "max_new_tokens": item.max_new_tokens})
    (folder / "questions.json").write_text(json.dumps(questions))
    path, flags = torchvision_for_a_plain_processor()
    command = [sys.executable, "-P", str(Path(__file__).with_name("plain_answers.py")), str(model)]
    result = subprocess.run(
        [*command, str(folder / "questions.json"), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def torchvision_for_a_plain_processor() -> tuple[str, list[str]]:
    """PYTHONPATH and flags under which AutoProcessor, which needs torchvision for Qwen-VL, finds it."""
    if importlib.util.find_spec("torchvision"):
        return "", []
    aside = Path(sys.prefix) / "torchvision-side"
    if not aside.is_dir():
        pytest.skip("transformers' own processor needs torchvision, and there is none for this torch")
    return str(aside), ["--declare-operators"]
