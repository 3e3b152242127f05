"""Which expert makes room on the fast path: the same tokens under every policy, and what is refused a slot is read."""

import pytest
from helpers.fast import CONVERSATIONS, load_fast, tokens

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.layer_policy import LAYER_POLICIES
from expertflow_quant.offload.synthetic_trace import RouteSizes, synthetic_trace

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def usage(folder_of, tmp_path_factory):
    """Routes of the model's sizes, most of them to few experts."""
    layers = load_fast(folder_of(FAMILY)).model.expert_store.layers
    sizes = RouteSizes(len(layers), len(layers[0].nbytes), layers[0].top_k)
    file = tmp_path_factory.mktemp("usage") / "routes.safetensors"
    synthetic_trace(sizes, steps=50, rows=1, prompt=5, skew=2.0).save(file)
    return file


@pytest.mark.parametrize("policy", sorted(LAYER_POLICIES))
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_are_the_same_and_every_miss_is_counted(policy, rows, folder_of, plain_of, usage):
    told = usage if policy in ("static", "predictive") else None
    engine = load_fast(folder_of(FAMILY), "60%", rows=rows, policy=policy, usage=told, compile_layers=False)
    assert tokens(engine, CONVERSATIONS[:rows]) == tokens(plain_of(FAMILY), CONVERSATIONS[:rows])
    resident = engine.runner.resident
    assert 0 < resident.stats.misses < resident.stats.requests
    assert resident.refuses is (policy in ("static", "predictive"))
    bringing = [one._overflows for one in engine.runner.graphs._passes.values() if hasattr(one, "_overflows")]
    assert all(any(each) for each in bringing) or not resident.refuses


def test_static_keeps_what_the_recorded_run_used_most(folder_of, usage):
    engine = load_fast(folder_of(FAMILY), "60%", rows=1, policy="static", usage=usage)
    before = engine.runner.resident.resident_experts()
    tokens(engine, CONVERSATIONS[:2])
    assert engine.runner.resident.resident_experts() == before


def test_a_recorded_run_of_another_model_is_refused(folder_of, tmp_path):
    synthetic_trace(RouteSizes(3, 5, 1), steps=4, rows=1, prompt=1).save(tmp_path / "other.safetensors")
    with pytest.raises(ExpertFlowError, match="was recorded with 3 layers of 5 experts"):
        load_fast(folder_of(FAMILY), "60%", policy="lfu", usage=tmp_path / "other.safetensors")
