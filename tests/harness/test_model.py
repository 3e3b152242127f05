"""The model that lmms-eval runs keeps the harness's contract, with its own base class or a stand-in for it."""

import inspect
import logging
import sys

import pytest
from helpers import fast, lmms

from expertflow_quant import Engine, ExpertFlowError, load
from expertflow_quant.harness import manifest

LIMITS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def module():
    with pytest.MonkeyPatch.context() as patch:
        yield lmms.model_module(patch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return fast.checkpoint(tmp_path_factory.mktemp("harness") / "vl", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "plain"
    fast.tiny.tiny_model("qwen3_vl_moe").save_pretrained(folder)
    fast.tiny.save_processor("qwen3_vl_moe", folder)
    return folder


def given(model, count=5, settings=LIMITS, **changes):
    """Requests for documents with a picture each, as the harness makes them."""
    docs = [{"image": fast.picture(number)} for number in range(count)]
    model.task_dict = {"charts": {lmms.SPLIT: docs}}
    return [lmms.Request(f"What is {number}?", settings, number, **changes) for number in range(count)]


def conversations(count=5):
    return [fast.asked(f"What is {number}?", fast.picture(number)) for number in range(count)]


def test_answers_are_the_engines_in_the_same_batches(module, checkpoint):
    model = module.ExpertFlow(str(checkpoint), "60%", "cpu", "2")
    found = model.generate_until(given(model))
    engine = load(checkpoint, "60%")
    wanted = [answer for first in (0, 2, 4) for answer in engine.generate(conversations()[first : first + 2], 6)]
    assert [answer.text for answer in found] == [answer.text for answer in wanted]
    counts = [(answer.token_counts.input_tokens, answer.token_counts.output_tokens) for answer in found]
    assert counts == [(answer.prompt_tokens, answer.completion_tokens) for answer in wanted]
    assert model.is_simple
    assert model.failures == {}


def test_a_plain_folder_is_taken_too(module, plain):
    model = module.ExpertFlow(str(plain), device="cpu", batch_size=5)
    wanted = Engine.from_plain(plain).generate(conversations(), 6)
    assert [answer.text for answer in model.generate_until(given(model))] == [answer.text for answer in wanted]


def test_limits_and_stop_texts_of_the_task_hold(module, checkpoint):
    model = module.ExpertFlow(str(checkpoint), device="cpu", batch_size=5)
    long = [answer.text for answer in model.generate_until(given(model, settings={"max_new_tokens": 12}))]
    stop = next(text[3] for text in long if len(text) > 3)
    cut = model.generate_until(given(model, settings={"max_new_tokens": 12, "until": [stop]}))
    assert [answer.text for answer in cut] == [text.split(stop)[0] for text in long]
    short = model.generate_until(given(model, settings={"max_new_tokens": 3}))
    assert {answer.token_counts.output_tokens for answer in short} == {3}


def test_sampling_repeats_itself_and_every_request_draws_its_own(module, checkpoint):
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5}
    model = module.ExpertFlow(str(checkpoint), device="cpu", batch_size=1, seed=3)
    (request,) = given(model, 1, settings)
    first, again = ([answer.text for answer in model.generate_until([request] * 3)] for _ in range(2))
    assert first == again
    assert len(set(first)) == 3


def test_pictures_come_in_every_form(module, checkpoint):
    model = module.ExpertFlow(str(checkpoint), device="cpu")
    forms = [lambda doc: doc["image"], lambda doc: [[doc["image"]]], lambda doc: (doc["image"],)]
    texts = {model.generate_until(given(model, 1, visuals=form))[0].text for form in forms}
    assert len(texts) == 1
    (alone,) = model.generate_until(given(model, 1, visuals=lambda doc: None))
    (wanted,) = model.engine.generate([fast.asked("What is 0?")], 6)
    assert alone.text == wanted.text
    with pytest.raises(ExpertFlowError, match=r"task charts shows a str.*pictures"):
        model.generate_until(given(model, 1, visuals=lambda doc: ["film.mp4"]))


def test_a_prompt_that_does_not_fit_costs_only_its_own_answer(module, checkpoint, caplog):
    model = module.ExpertFlow(str(checkpoint), device="cpu", batch_size=3)
    requests = given(model, 3)
    wanted = [answer.text for answer in model.generate_until([requests[0], requests[2]])]
    requests[1].context = "long " * 200
    with caplog.at_level(logging.WARNING):
        found = model.generate_until(requests)
    assert found[1].text == ""
    assert [found[0].text, found[2].text] == wanted
    assert list(model.failures) == [("charts", 1)]
    assert "exceed" in model.failures["charts", 1]
    assert "charts document 1 is answered with nothing" in caplog.text


def test_other_kinds_of_request_are_refused_by_name(module, checkpoint):
    model = module.ExpertFlow(str(checkpoint), device="cpu")
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(ExpertFlowError, match=rf"asks for {name}, .*choose a task"):
            getattr(model, name)([])


def test_arguments_are_those_of_load(module, checkpoint, monkeypatch):
    taken = {}
    monkeypatch.setattr(module, "load", lambda *arguments, **options: taken.update(options, all=arguments))
    module.ExpertFlow(
        str(checkpoint), "25%", "cuda:1", gpu_memory="8GiB", host_memory=None, policy="lru", dtype="float16"
    )
    assert taken == {"all": (checkpoint, "25%", "cuda:1", "float16"), "gpu_memory": "8GiB", "policy": "lru"}
    assert set(module.OF_LOAD) < set(inspect.signature(load).parameters)
    with pytest.raises(ExpertFlowError, match=r"model argument max_pixels is not known: give pretrained"):
        module.ExpertFlow(str(checkpoint), max_pixels=100)


@pytest.mark.parametrize("batch_size", [0, "auto", "-1", "2.5", ""])
def test_a_batch_size_is_a_number(module, checkpoint, batch_size):
    with pytest.raises(ExpertFlowError, match=r"batch_size .* whole number"):
        module.ExpertFlow(str(checkpoint), device="cpu", batch_size=batch_size)


def test_memory_of_a_plain_folder_and_several_processes_are_refused(module, plain, monkeypatch):
    with pytest.raises(ExpertFlowError, match=r"no checkpoint of ours, and gpu_memory, expert_memory"):
        module.ExpertFlow(str(plain), "25%", "cpu", gpu_memory="1GiB")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ExpertFlowError, match=r"2 processes were started"):
        module.ExpertFlow(str(plain), device="cpu")


def test_the_entry_point_names_a_class_that_is_there(module, monkeypatch):
    lmms.provide(monkeypatch)
    found = manifest.manifest()
    assert (found.model_id, found.chat_class_path) == ("expertflow", None)
    assert found.simple_class_path == f"{module.ExpertFlow.__module__}.{module.ExpertFlow.__qualname__}"


def test_without_the_harness_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, lmms.MODULE, raising=False)
    with pytest.raises(ExpertFlowError, match=r"pip install 'expertflow-quant\[lmms\]'"):
        __import__(lmms.MODULE)
