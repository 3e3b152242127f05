"""The experts function alone, on the experts modules of several families, against their own eager code."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.seams import expert_modules
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.experts import LayerExperts, attach, experts_forward


def mixed(layer, expert):
    return ("int4-g16", "bf16", "int3-g16-asym", "int8-channel", "int2-g16")[(layer + expert) % 5]


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "nemotron_h"])
def case(request, tmp_path):
    """A plain experts module with the weights that its checkpoint stored, and our twin of it."""
    model = tiny.tiny_model(request.param)
    folder = tiny.write_checkpoint(model, tmp_path / "checkpoint", mixed)
    plain = expert_modules(tiny.dequantized(model, mixed))[0][1]
    ours = expert_modules(model)[0][1]
    store = ExpertStore(CheckpointReader(folder))
    return SimpleNamespace(plain=plain, ours=ours, store=store)


def run(case, budget, hidden, index, weights):
    attach(case.ours, LayerExperts(ExpertCache(case.store, budget), 0))
    return experts_forward(case.ours, hidden, index, weights)


def routed(case, tokens, top_k=2, seed=0):
    torch.manual_seed(seed)
    experts = case.plain.num_experts
    weights, index = torch.rand(tokens, experts).topk(top_k)
    return torch.randn(tokens, case.store.layout(0, 0).shape.hidden), index, weights


def eager(case, hidden, index, weights):
    case.plain.config._experts_implementation = "eager"
    with torch.no_grad():
        return case.plain(hidden, index, weights)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_equals_the_familys_own_code_at_any_budget(case, tokens):
    inputs = routed(case, tokens)
    full = run(case, case.store.nbytes, *inputs)
    torch.testing.assert_close(full, eager(case, *inputs), rtol=1e-4, atol=1e-5)
    minimum = ExpertCache(case.store, case.store.nbytes).minimum_bytes
    for budget in (minimum, minimum + 5000, minimum + 20000):
        assert torch.equal(run(case, budget, *inputs), full)


def test_is_the_same_bits_whatever_is_resident(case):
    inputs = routed(case, 9)
    cache = ExpertCache(case.store, ExpertCache(case.store, case.store.nbytes).minimum_bytes)
    attach(case.ours, LayerExperts(cache, 0))
    first = experts_forward(case.ours, *inputs)
    for seed in range(5):
        experts_forward(case.ours, *routed(case, 3, seed=seed))
        assert torch.equal(experts_forward(case.ours, *inputs), first)
    assert cache.stats.hits > 0
    assert cache.stats.misses > 0


def test_ids_beyond_the_last_expert_add_nothing(case):
    hidden, index, weights = routed(case, 6)
    index[::2, 1] = case.plain.num_experts
    index[3] = case.plain.num_experts + 1
    got = run(case, case.store.nbytes, hidden, index, weights)
    weights = torch.where(index < case.plain.num_experts, weights, 0.0)
    wanted = eager(case, hidden, index.clamp(max=case.plain.num_experts - 1), weights)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not got[3].any()


def test_the_same_expert_twice_for_one_token_counts_twice(case):
    hidden, index, weights = routed(case, 4)
    index[1] = index[1, 0]
    got = run(case, case.store.nbytes, hidden, index, weights)
    torch.testing.assert_close(got, eager(case, hidden, index, weights), rtol=1e-4, atol=1e-5)


def test_bf16_hidden_states_stay_bf16(case):
    hidden, index, weights = routed(case, 5)
    got = run(case, case.store.nbytes, hidden.bfloat16(), index, weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), eager(case, hidden, index, weights), rtol=0.05, atol=0.1)


def test_no_tokens_give_no_rows(case):
    hidden, index, weights = routed(case, 2)
    assert run(case, case.store.nbytes, hidden[:0], index[:0], weights[:0]).shape == hidden[:0].shape


def test_nothing_of_it_enters_autograd(case):
    hidden, index, weights = routed(case, 2)
    assert not run(case, case.store.nbytes, hidden.requires_grad_(), index, weights).requires_grad


def test_training_is_refused(case):
    inputs = routed(case, 2)
    case.ours.train()
    with pytest.raises(ExpertFlowError, match=r"call model\.eval\(\)"):
        run(case, case.store.nbytes, *inputs)


def test_another_device_is_refused(case):
    hidden, index, weights = routed(case, 2)
    with pytest.raises(ExpertFlowError, match="device_map='meta'"):
        run(case, case.store.nbytes, hidden.to("meta"), index, weights)


def test_a_module_without_a_checkpoint_is_refused(case):
    with pytest.raises(ExpertFlowError, match="no experts attached"):
        experts_forward(case.plain, *routed(case, 2))
