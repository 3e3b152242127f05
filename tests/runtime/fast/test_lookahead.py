"""Looking ahead by the next routers: the same tokens, bytes moved early, and guesses that are those routers' own."""

import pytest
import torch
from helpers.fast import CONVERSATIONS, load_fast, rebuilt

import expertflow_quant
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.seams import find_router
from expertflow_quant.runtime.experts import attached
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.lookahead import LookAhead, next_gate
from expertflow_quant.runtime.fast.probe import FastPathError

FAMILY = "qwen3_moe"


def names_of(model):
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in attached(model)]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_vl_moe"])
def test_tokens_are_the_same_and_bytes_move_early(family, folder_of):
    options = FastOptions(rows=1, room=160, look_ahead="next-gate")
    engine = expertflow_quant.load(folder_of(family), "60%", fast=True, options=options)
    plain = load_fast(folder_of(family), "60%", rows=1)
    wanted = plain.generate(CONVERSATIONS[:2], 10)
    assert [a.token_ids for a in engine.generate(CONVERSATIONS[:2], 10)] == [a.token_ids for a in wanted]
    spare = family not in ("mixtral", "gpt_oss")  # those have no slot that this step could give away
    assert (engine.runner.resident.prefetched_bytes > 0) is spare
    assert plain.runner.resident.prefetched_bytes == 0


def test_a_guess_is_what_that_router_would_choose(folder_of):
    model = load_fast(folder_of(FAMILY)).model
    guess = next_gate(model, names_of(model), [2, 2], [64, 64])
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for layer, name in enumerate(names_of(model)):
        _, _, chosen = find_router(model, name)(hidden)
        assert torch.equal(guess(layer, hidden), chosen)
    assert guess(0, None) is None


def test_rows_that_are_not_active_are_not_guessed_for(folder_of):
    options = FastOptions(rows=4, room=160, look_ahead="next-gate")
    engine = expertflow_quant.load(folder_of(FAMILY), "99%", fast=True, options=options)
    decode = engine.runner.graphs._passes[4]
    decode._active[:] = torch.tensor([True, False, True, False])
    ids = decode._guessed(decode._ahead, 1, torch.randn(4, 64))
    assert (ids[[1, 3]] == 8).all()
    assert (ids[[0, 2]] < 8).all()


def test_a_guess_for_more_rows_than_a_step_has_is_cut(folder_of):
    engine = load_fast(folder_of(FAMILY), "99%", rows=4)
    everyone = torch.arange(8).view(4, 2)
    options = FastOptions(rows=4, room=160)
    runner = rebuilt(engine, "99%", options, make_ahead=lambda *_: LookAhead(lambda *_: everyone, 1, engine.device))
    runner.graphs.active[:2] = True
    for bucket in (1, 2):
        decode = runner.graphs._passes[bucket]
        assert decode._guessed(decode._ahead, 0, None).tolist() == everyone[:bucket].tolist()
        with torch.inference_mode():
            runner.graphs.step(bucket)


def test_bad_settings_are_refused(folder_of):
    with pytest.raises(ExpertFlowError, match="look_ahead 'far' is not known: use 'off', 'next-gate' or the folder"):
        FastOptions(look_ahead="far")
    with pytest.raises(ExpertFlowError, match="at least 1"):
        LookAhead(lambda layer, hidden: None, 0, torch.device("cpu"))
    model = load_fast(folder_of(FAMILY)).model
    del find_router(model, names_of(model)[1])._parameters["weight"]
    with pytest.raises(FastPathError, match="no weight for the 64 hidden states"):
        next_gate(model, names_of(model), [2, 2], [64, 64])
