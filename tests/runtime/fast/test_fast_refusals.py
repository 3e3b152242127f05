"""Models and options that the fast path does not take, and what happens then."""

import logging
import re
import shutil
import subprocess
import weakref

import pytest
import torch
import transformers
from helpers import fast, tiny
from helpers.fast import CONVERSATIONS, load_fast, tokens

import expertflow_quant
from expertflow_quant import ExpertFlowError
from expertflow_quant.models.seams import expert_modules
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.runtime import experts, loading
from expertflow_quant.runtime.fast import build
from expertflow_quant.runtime.fast.build import FastOptions, build_fast, share_expert_memory
from expertflow_quant.runtime.fast.decode import DecodeGraphs
from expertflow_quant.runtime.fast.probe import FastPathError, gate_of, probe, use_our_attention


class SeeminglyGpu:
    """A device whose type says cuda, so that ``load`` chooses what it would choose there, and whose name is cpu."""

    type = "cuda"

    def __str__(self):
        return "cpu"


def test_a_model_that_cannot_take_it_says_why(folder_of):
    with pytest.raises(FastPathError, match="layer 0 has heads of 32 for keys and 16 for values"):
        expertflow_quant.load(folder_of(fast.REFUSED), fast=True)


@pytest.fixture
def seemingly_gpu(monkeypatch):
    monkeypatch.setattr(loading, "pick_device", lambda device: SeeminglyGpu())
    monkeypatch.setattr(loading, "pinned_store", lambda store, *rest: store)


def test_where_it_was_not_asked_for_the_plain_path_is_taken_with_a_warning(folder_of, plain_of, seemingly_gpu, caplog):
    with caplog.at_level(logging.WARNING, logger="expertflow_quant"):
        engine = expertflow_quant.load(folder_of(fast.REFUSED), dtype=torch.float32)
    assert "heads of 32 for keys and 16 for values" in caplog.text
    assert "the plain path is taken" in caplog.text
    assert engine.runner.max_rows is None
    assert engine.device_expert_bytes == engine.expert_bytes
    assert tokens(engine, CONVERSATIONS[:3]) == tokens(plain_of(fast.REFUSED), CONVERSATIONS[:3])
    assert engine.stats.requests > 0


@pytest.mark.parametrize(
    ("sizes", "format", "named"),
    [
        ({}, "int4-g4", "a group must be a multiple of 8 columns"),
        ({"moe_intermediate_size": 20}, "bf16", "8 experts of 64 by 20: .* multiples of 8"),
        ({"num_experts": 513, "moe_intermediate_size": 8}, "bf16", "513 experts of 64 by 8: .* at most 512"),
    ],
)
def test_experts_that_kernels_do_not_take_are_run_plainly(sizes, format, named, tmp_path, seemingly_gpu):
    config = transformers.Qwen3MoeConfig(**{**tiny.TEXT, **tiny.MOE, "num_hidden_layers": 1, **sizes})
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    folder = tiny.write_checkpoint(model, tmp_path / "out", lambda layer, expert: format)
    tiny.save_processor("qwen3_moe", folder)
    engine = expertflow_quant.load(folder, dtype=torch.float32)
    assert re.search(named, engine.plain_because)
    assert len(tokens(engine, CONVERSATIONS[:1], 2)[0]) == 2
    with pytest.raises(FastPathError, match=named):
        load_fast(folder)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_a_model_whose_fast_path_failed_late_is_a_plain_one_again(
    family, folder_of, plain_of, seemingly_gpu, monkeypatch
):
    def built_and_refused(*args, **options):
        build_fast(*args, **options)
        raise FastPathError("on second thoughts, no")

    monkeypatch.setattr(loading, "build_fast", built_and_refused)
    engine = expertflow_quant.load(folder_of(family), dtype=torch.float32)
    assert engine.runner.max_rows is None
    assert tokens(engine, CONVERSATIONS[:3]) == tokens(plain_of(family), CONVERSATIONS[:3])
    with pytest.raises(FastPathError, match="second thoughts"):
        expertflow_quant.load(folder_of(family), dtype=torch.float32, fast=True)


def test_what_a_fast_path_that_failed_had_taken_is_given_back_first(folder_of, seemingly_gpu, monkeypatch):
    """Or a device would have to hold the slots of both."""
    made, left = [], []

    class Noted(ResidentExperts):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(weakref.ref(self))

    def broken(*args):
        error = RuntimeError("no compiler")
        error.own = error  # as errors of compilers do
        raise error

    with_cache = loading._with_cache
    monkeypatch.setattr(build, "ResidentExperts", Noted)
    monkeypatch.setattr(DecodeGraphs, "capture", broken)
    monkeypatch.setattr(loading, "_with_cache", lambda *args: (left.append(made[0]()), with_cache(*args))[1])
    engine = expertflow_quant.load(folder_of("qwen3_moe"), dtype=torch.float32)
    assert engine.plain_because == "Qwen3MoeForCausalLM could not be compiled or captured: no compiler"
    assert left == [None]


def test_on_a_gpu_the_fast_path_is_what_is_taken(folder_of, plain_of, seemingly_gpu):
    engine = expertflow_quant.load(folder_of("qwen3_moe"), "50%", dtype=torch.float32)
    assert engine.runner.max_rows == FastOptions().rows
    assert tokens(engine, CONVERSATIONS[:2]) == tokens(plain_of("qwen3_moe"), CONVERSATIONS[:2])
    plain = expertflow_quant.load(folder_of("qwen3_moe"), fast=False, dtype=torch.float32)
    assert plain.runner.max_rows is None


def test_on_the_cpu_nothing_is_fast_unless_it_is_asked_for(folder_of):
    assert expertflow_quant.load(folder_of("qwen3_moe")).runner.max_rows is None


def test_a_model_of_the_fast_path_is_not_called_by_itself(folder_of):
    engine = load_fast(folder_of("qwen3_moe"))
    ids = torch.full((1, 3), 20)
    with pytest.raises(ExpertFlowError, match="fast"):
        engine.model(input_ids=ids)


def test_a_model_without_experts_is_refused():
    config = transformers.Qwen3Config(**tiny.TEXT, intermediate_size=48)
    model = transformers.Qwen3ForCausalLM(config).eval()
    use_our_attention(model)
    with pytest.raises(FastPathError, match="no attention or no experts"):
        probe(model, torch.device("cpu"))


def test_a_window_that_is_only_in_the_mask_is_refused():
    text = {name: value for name, value in tiny.TEXT.items() if name != "head_dim"}
    sizes = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    for window in (None, 8):
        config = transformers.PhimoeConfig(**text, **sizes, sliding_window=window)
        model = transformers.PhimoeForCausalLM(config).eval()
        model.set_experts_implementation(experts.NAME)
        for layer, (_, module) in enumerate(expert_modules(model)):
            experts.attach(module, experts.LayerExperts(None, layer))
        use_our_attention(model)
        if window is None:
            assert len(probe(model, torch.device("cpu")).gates) == 2
            continue
        with pytest.raises(FastPathError, match="by a mask alone of a window of 8 tokens"):
            probe(model, torch.device("cpu"))


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
LONG |= {"short_mscale": 1.1, "long_mscale": 1.2, "original_max_position_embeddings": 64, "rope_theta": 1e4}


@pytest.mark.parametrize("rope", [LONG, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}])
def test_frequencies_that_change_with_the_length_are_refused(rope):
    text = {name: value for name, value in tiny.TEXT.items() if name != "head_dim"}
    if rope is LONG:
        made = transformers.PhimoeConfig, transformers.PhimoeForCausalLM
        text |= {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    else:
        made, text = (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM), tiny.TEXT | tiny.MOE
    model = made[1](made[0](**text, rope_parameters=rope)).eval()
    model.set_experts_implementation(experts.NAME)
    for layer, (_, module) in enumerate(expert_modules(model)):
        experts.attach(module, experts.LayerExperts(None, layer))
    use_our_attention(model)
    with pytest.raises(FastPathError, match="change with a text's length"):
        probe(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"use_bidirectional_attention": "vision"}, "see later ones"), ({"layer_types": ["chunked_attention"]}, "chunks")],
)
def test_masks_that_are_not_causal_are_refused(flags, named, folder_of):
    model = load_fast(folder_of("qwen3_moe")).model
    for name, value in flags.items():
        setattr(model.config, name, value)
    with pytest.raises(FastPathError, match=named):
        probe(model, torch.device("cpu"))


def test_a_model_that_keeps_a_state_of_its_own_is_refused(tmp_path):
    text = {name: value for name, value in tiny.TEXT.items() if name != "head_dim"}
    kinds = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0}
    model = transformers.Lfm2MoeForCausalLM(transformers.Lfm2MoeConfig(**text, **tiny.MOE, **kinds)).eval()
    tiny.write_checkpoint(model, tmp_path / "out", lambda layer, expert: "int4-g16")
    tiny.save_processor("lfm2_moe", tmp_path / "processor")
    for file in (tmp_path / "processor").iterdir():
        shutil.copy(file, tmp_path / "out")
    with pytest.raises(FastPathError, match=r"Lfm2MoeForCausalLM .* layer 0 keeps a state of its own in the cache"):
        load_fast(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "fused", "axes"),
    [
        ("qwen3_moe", "silu", False),
        ("qwen3_vl_moe", "silu", True),
        ("mixtral", "silu", False),
        ("olmoe", "silu", False),
        ("gpt_oss", None, False),  # a gate of its own
        ("nemotron_h", None, False),  # no gate at all
    ],
)
def test_what_the_probe_finds(family, fused, axes, folder_of):
    findings = load_fast(folder_of(family)).runner._findings
    assert findings.kv
    assert all((kv.heads, kv.key_size, kv.value_size) == (2, 16, 16) for kv in findings.kv.values())
    assert [gate.fused for gate in findings.gates] == [fused] * 2
    assert bool(findings.position_axes) == axes


def test_another_activation_is_not_fused():
    model = tiny.tiny_model("qwen3_moe")
    module = model.model.layers[0].mlp.experts
    assert gate_of(module).fused == "silu"
    module.act_fn = torch.nn.GELU()
    assert gate_of(module).fused is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rows": 0}, "rows 0 must be at least 1"),
        ({"rows": 33}, "give at most 32"),
        ({"room": 1}, "room 1 must be at least 2"),
        ({"prefill_tokens": 0}, "prefill_tokens 0"),
        ({"policy": "fifo"}, "policy 'fifo' is not known: use one of lru, lfu, static, predictive"),
        ({"policy": "static"}, "needs a recorded run"),
    ],
)
def test_options_out_of_range_are_refused(options, named):
    with pytest.raises(ExpertFlowError, match=named):
        FastOptions(**options)


@pytest.mark.parametrize(
    ("rows", "buckets"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (8, (1, 2, 4, 8)), (32, (1, 2, 4, 8, 16, 32))]
)
def test_buckets_reach_the_rows(rows, buckets):
    assert FastOptions(rows=rows).buckets == buckets


def test_expert_memory_is_shared_within_the_budget(folder_of):
    layers = load_fast(folder_of("qwen3_moe")).model.expert_store.layers
    largest = max(max(layer.nbytes) for layer in layers)
    total = sum(sum(layer.nbytes) for layer in layers)
    for budget in range(2 * largest, total, largest // 2):
        shared = share_expert_memory(layers, budget)
        assert shared.slot_bytes + shared.ring_slots * largest == budget
        assert shared.slot_bytes >= 0
        assert shared.ring_slots >= 2
        assert shared.ring_slots % shared.chunk == 0
    assert share_expert_memory(layers, total).slot_bytes == total


def test_what_cannot_be_captured_is_refused_by_name_but_want_of_memory_is_not(folder_of, monkeypatch):
    def broken(self, on_bucket=None):
        raise RuntimeError("no C compiler\nand much more")

    monkeypatch.setattr(DecodeGraphs, "capture", broken)
    with pytest.raises(FastPathError, match=r"could not be compiled or captured: no C compiler$"):
        load_fast(folder_of("qwen3_moe"))

    def full(self, on_bucket=None):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(DecodeGraphs, "capture", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_fast(folder_of("qwen3_moe"))


def test_kernels_that_do_not_compile_are_refused_by_name(folder_of, monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")
    for error, said in (
        (errors.OutOfResources(149568, 101376, "shared memory"), "out of resource: shared memory, Required: 149568"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), r"Command '\['gcc', 'main.c'\]' returned non-zero exit"),
    ):

        def broken(self, on_bucket=None, error=error):
            raise error

        monkeypatch.setattr(DecodeGraphs, "capture", broken)
        with pytest.raises(FastPathError, match=f"could not be compiled or captured: {said}"):
            load_fast(folder_of("qwen3_moe"))


def test_batch_sizes_that_are_captured():
    assert FastOptions(rows=3).buckets == (1, 2, 4)
    assert FastOptions(rows=3, captured=(16, 2)).buckets == (2, 16)
    for rows, captured in ((3, (1, 2)), (3, (5,)), (1, ())):
        with pytest.raises(
            ExpertFlowError, match=r"give some of \(1, 2, 4, 8, 16, 32\), one of them at least the rows"
        ):
            FastOptions(rows=rows, captured=captured)
