"""Answers computed together as one stream say what ``generate`` says, each to its own length."""

import shutil
import threading

import pytest
import torch
from helpers import tiny

import expertflow_quant
from expertflow_quant import ExpertFlowError
from expertflow_quant.offload.path_model import PathModel, PathModelSizes
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.runtime.answers import Generation
from expertflow_quant.runtime.foretell import foreteller
from expertflow_quant.runtime.schedule import predicted_path, word_path

ASKED = [[{"role": "user", "content": text}] for text in ("What is a router?", "Two?", "A third, longer question")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    tiny.write_checkpoint(tiny.tiny_model("qwen3_moe"), root / "out", lambda layer, expert: "int4-g16")
    tiny.save_processor("qwen3_moe", root / "processor")
    for file in (root / "processor").iterdir():
        shutil.copy(file, root / "out")
    return root / "out"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "fast"])
def engine(request, folder):
    return expertflow_quant.load(folder, fast=request.param, context=128, rows=4)


def read(stream):
    """Pieces and the answer of each row, as they came."""
    pieces, answers = {}, {}
    for row, found in stream:
        assert row not in answers
        if isinstance(found, Generation):
            answers[row] = found
        else:
            pieces[row] = pieces.get(row, "") + found
    return pieces, answers


def test_every_row_says_what_generate_says(engine):
    lengths = [9, 3, 6]
    wanted = [one.token_ids for one in engine.generate(ASKED, 9)]
    pieces, answers = read(engine.stream_many(ASKED, lengths))
    assert [answers[row].token_ids for row in range(3)] == [ids[:n] for ids, n in zip(wanted, lengths)]
    assert [answers[row].text for row in range(3)] == [pieces[row] for row in range(3)]
    assert [answers[row].prompt_tokens for row in range(3)] == [one.prompt_tokens for one in engine.generate(ASKED, 1)]


def test_a_stop_text_ends_its_row_alone(engine):
    whole = engine.generate(ASKED, 9)
    stop = next(text for text in whole[0].text if not any(text in other.text for other in whole[1:]))
    _, answers = read(engine.stream_many(ASKED, [9] * 3, stop=(stop,)))
    assert (answers[0].text, answers[0].finish_reason) == (whole[0].text.split(stop)[0], "stop")
    assert [answers[row].token_ids for row in (1, 2)] == [one.token_ids for one in whole[1:]]


def test_a_dropped_row_has_no_more_events_and_the_last_one_ends_it_all(engine):
    wanted = engine.generate(ASKED, 60)
    stream = engine.stream_many(ASKED, [60] * 3)
    next(stream)
    stream.drop(0)
    _, answers = read(stream)
    assert set(answers) == {1, 2}
    assert [answers[row].token_ids for row in (1, 2)] == [one.token_ids for one in wanted[1:]]
    stream = engine.stream_many(ASKED, [60] * 3)
    for row in range(3):
        stream.drop(row)
    assert list(stream) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "expertflow-batch"]


def test_too_many_at_once_are_refused(engine):
    for asked, lengths in ((ASKED * 2, [4] * 6), (ASKED, [4]), ([], [])):
        with pytest.raises(ExpertFlowError, match=r"give 1 to . of both"):
            engine.stream_many(asked, lengths)


def test_distinct_experts_are_counted_over_decode_steps(folder):
    engine, seen = expertflow_quant.load(folder, "50%"), []
    engine.model.expert_cache.progress.watch(lambda layer, experts: seen.append((layer, set(experts))))
    engine.generate(ASKED, 5)
    decode = seen[2:]
    union = [set().union(*(experts for at, experts in decode if at == layer)) for layer in range(2)]
    assert engine.distinct_experts == sum(map(len, union)) / 2
    engine.generate(ASKED, 1)
    assert engine.distinct_experts is None


def test_paths_are_foretold_of_prompts(folder, tmp_path):
    engine = expertflow_quant.load(folder, "50%")
    assert foreteller(engine, folder, "auto") is None
    assert foreteller(engine, folder, "arrival") is None
    words = foreteller(engine, folder, "words")
    assert torch.equal(words(ASKED[1]), word_path(engine.prompt_tokens(ASKED[1]).inputs["input_ids"][0]))
    torch.manual_seed(0)
    predictor = PathPredictor(
        PathModel(PathModelSizes(tokens=tiny.VOCABULARY, layers=2, experts=8, width=16, inner=32))
    )
    predictor.save(tmp_path)
    found = foreteller(engine, folder, "paths", str(tmp_path))(ASKED[0])
    assert found.shape == (2, 8)
    assert found.sum(1).tolist() == [2, 2]
    for message, asked, at in (
        ("no predictor that can be read", "paths", folder),
        ("'best' is not known", "best", tmp_path),
    ):
        with pytest.raises(ExpertFlowError, match=message):
            foreteller(engine, at, asked)
    PathPredictor(PathModel(PathModelSizes(tokens=9, layers=3, experts=8, width=16, inner=32))).save(tmp_path)
    with pytest.raises(ExpertFlowError, match="another model's"):
        foreteller(engine, tmp_path, "auto")


def test_a_predicted_path_names_the_likeliest_experts():
    logits = torch.full((10, 2, 5), -4.0)
    logits[:2, :, 0] = 9.0  # before the last eight tokens
    logits[4:, 0, 3] = logits[5, 0, 1] = 4.0
    logits[9, 1, 2] = logits[8, 1, 4] = 3.0
    assert predicted_path(logits, 2).nonzero().tolist() == [[0, 1], [0, 3], [1, 2], [1, 4]]
