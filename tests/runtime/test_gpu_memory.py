"""A promised device memory: what is planned, what is refused, what is checked once the model is built."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.apart import told_by
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import expertflow_quant
from expertflow_quant import ExpertFlowError
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.models.processor import load_processor
from expertflow_quant.models.seams import read_config
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime import loading, memory_device, promise
from expertflow_quant.runtime.fast.build import FastOptions, share_expert_memory
from expertflow_quant.runtime.fast.needs import fast_needs, longest_pass, share, weights_dtype
from expertflow_quant.runtime.fast.probe import FastPathError
from expertflow_quant.runtime.longest import NEW_TOKENS, longest_prompts, patches_per_token
from expertflow_quant.runtime.memory import DRIVER_BYTES, MemoryPlanError, Needs
from expertflow_quant.runtime.memory_needs import backbone_bytes
from expertflow_quant.runtime.prompts import PromptEncoder, PromptError

MiB, GiB = 2**20, 2**30
ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "calibration" / "shipped" / "moe"
VISION, TEXT = "qwen3_vl_moe", "qwen3_moe"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("promise")
    for family in (VISION, TEXT, "gpt_oss"):
        tiny.write_checkpoint(tiny.tiny_model(family), root / family, lambda layer, expert: "int4-g16")
        tiny.save_processor(family, root / f"{family}.processor")
        shutil.copytree(root / f"{family}.processor", root / family, dirs_exist_ok=True)
    return root


class SeeminglyGpu:
    """A device whose type says cuda and whose name is cpu."""

    type = "cuda"

    def __str__(self):
        return "cpu"


@pytest.fixture
def gpu(monkeypatch):
    """A device of 24 GiB that lives on the CPU; ``peak`` is what it says a run took, ``limits`` what it was told."""

    class Device:
        peak, limits, runs = 0, [], []

    def measured(run, device):
        run()
        Device.runs.append(device)
        return Device.peak

    Device.limits, Device.runs = [], []
    monkeypatch.setattr(loading, "pick_device", lambda device: SeeminglyGpu())
    monkeypatch.setattr(promise, "device_bytes", lambda device: 24 * GiB)
    monkeypatch.setattr(memory_device, "limit_process", lambda total, device: Device.limits.append(total))
    monkeypatch.setattr(memory_device, "measure_peak", measured)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    return Device


def promised(folder, gpu_memory, **options):
    options = {"context": 120, "rows": 1, "dtype": torch.float32} | options
    return expertflow_quant.load(folder, gpu_memory=gpu_memory, **options)


def smallest(folder, **options):
    with pytest.raises(MemoryPlanError) as error:
        promised(folder, MiB, **options)
    return error.value.smallest_total


def parts(plan):
    return [nbytes for _, nbytes, _ in plan.needs.parts()]


@pytest.mark.parametrize("family", [VISION, TEXT])
def test_experts_get_what_is_left_and_the_longest_prompt_was_read(family, folders, gpu):
    least, nbytes = smallest(folders / family), ExpertStore(CheckpointReader(folders / family)).nbytes
    assert gpu.limits == []
    total = least + nbytes // 2
    engine = promised(folders / family, total)
    plan = engine.memory_plan
    assert gpu.limits == [plan.total] == [total]
    assert sum(parts(plan)) + plan.experts <= total
    assert 0 < engine.device_expert_bytes <= plan.experts + plan.staging < nbytes
    assert len(gpu.runs) == 1
    longest = int(engine.runner.kv.lengths.max())
    assert 110 <= longest <= engine.context == 120
    assert engine.stats.requests == 0
    plain = expertflow_quant.load(folders / family, device="cpu", fast=False, dtype=torch.float32)
    asked = [[{"role": "user", "content": "How many?"}]]
    assert engine.generate(asked, 6)[0].token_ids == plain.generate(asked, 6)[0].token_ids


def test_all_experts_are_resident_where_they_fit(folders, gpu):
    engine = promised(folders / TEXT, "8GiB")
    plan = engine.memory_plan
    assert plan.experts == engine.expert_bytes
    assert plan.free > 0
    assert plan.experts <= engine.device_expert_bytes <= plan.experts + plan.staging
    assert promised(folders / TEXT, "8GiB", expert_memory="50%").device_expert_bytes <= plan.experts // 2


def test_what_does_not_fit_is_refused_before_the_model_is_read(folders, gpu, monkeypatch):
    monkeypatch.setattr(loading, "_model", lambda *args: pytest.fail("the model was read"))
    with pytest.raises(MemoryPlanError, match=r"--gpu-memory 700\.0 MiB does not hold this model") as error:
        promised(folders / VISION, "700MiB")
    assert "KV cache" in str(error.value)
    assert "raise --gpu-memory to" in str(error.value)
    with pytest.raises(MemoryPlanError, match="the device has 24"):
        promised(folders / VISION, "25GiB")
    assert gpu.limits == []


def test_a_promise_that_did_not_hold_is_an_error_with_numbers(folders, gpu, monkeypatch):
    gpu.peak = 8 * GiB - DRIVER_BYTES
    assert promised(folders / VISION, "8GiB").memory_plan.reservable == gpu.peak
    gpu.peak += 1
    with pytest.raises(MemoryPlanError, match=r"--gpu-memory 8\.0 GiB could not be kept: 1 prompts of 1\d\d tokens"):
        promised(folders / VISION, "8GiB")

    def full(run, device):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(memory_device, "measure_peak", full)
    with pytest.raises(MemoryPlanError, match=r"more was needed \(Tried to allocate 2.00 GiB\.\).*--context"):
        promised(folders / VISION, "8GiB")


def test_without_a_promise_a_full_device_is_what_torch_says():
    with pytest.raises(torch.OutOfMemoryError), promise.promised(None):
        raise torch.OutOfMemoryError("full")


def test_a_cpu_makes_no_promise(folders):
    with pytest.raises(ExpertFlowError, match=r"--gpu-memory '1GiB' .* the device is cpu: .*--expert-memory"):
        expertflow_quant.load(folders / TEXT, gpu_memory="1GiB")
    with pytest.raises(ExpertFlowError, match=r"--host-memory '1GiB' .* the device is cpu"):
        expertflow_quant.load(folders / TEXT, host_memory="1GiB")


def test_the_plain_path_makes_no_promise(folders, gpu, monkeypatch):
    with pytest.raises(ExpertFlowError, match=r"by the fast path only, which was turned off: .*--expert-memory"):
        promised(folders / TEXT, "1GiB", fast=False)
    monkeypatch.setattr(loading, "build_fast", refuse)
    with pytest.raises(FastPathError, match=r"odd heads; .*--expert-memory instead"):
        promised(folders / TEXT, "8GiB")


def refuse(*args, **options):
    raise FastPathError("odd heads")


def test_a_prompt_beyond_the_room_is_refused(folders, gpu):
    engine = promised(folders / VISION, "8GiB", context=60)
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    engine.generate([[{"role": "user", "content": "What?"}]], 4)
    with pytest.raises(PromptError, match=r"\(64 of them image\) .* exceed the room kept for a row .* of 60"):
        engine.generate([[{"role": "user", "content": [picture]}]], 4)
    plain = expertflow_quant.load(folders / VISION, fast=False, context=60, dtype=torch.float32)
    with pytest.raises(PromptError, match=r"\(--context\) of 60"):
        plain.generate([[{"role": "user", "content": [picture]}]], 4)


def test_more_room_than_the_model_reads_is_not_kept(folders):
    engine = expertflow_quant.load(folders / TEXT, fast=True, context=4096, rows=3)
    assert (engine.runner.room, engine.context, engine.runner.max_rows) == (256, 256, 4)
    assert engine.memory_plan is None
    assert engine.plain_because is None


def test_records_that_are_not_pinned_take_the_plain_path(folders, monkeypatch, caplog):
    refuse_unpinned = loading._refuse_unpinned
    monkeypatch.setattr(loading, "pick_device", lambda device: SeeminglyGpu())
    monkeypatch.setattr(loading, "_refuse_unpinned", lambda store, device: refuse_unpinned(store, torch.device("cuda")))
    with caplog.at_level(logging.WARNING, logger="expertflow_quant"):
        engine = expertflow_quant.load(folders / TEXT, dtype=torch.float32)
    assert "--host-memory" in caplog.text
    assert "plain path" in caplog.text
    assert "0 B of " in engine.plain_because
    assert engine.runner.max_rows is None
    with pytest.raises(FastPathError, match=r"are in pinned memory, .* give more with --host-memory"):
        expertflow_quant.load(folders / TEXT, fast=True)


def test_as_many_records_are_pinned_as_host_memory_allows(folders, monkeypatch):
    store, told = ExpertStore(CheckpointReader(folders / TEXT)), []
    kept = {"allocate": lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)}
    monkeypatch.setattr(loading, "ExpertStore", lambda *args, **options: ExpertStore(*args, **options, **kept))
    monkeypatch.setattr(loading, "available_bytes", lambda: 2 * store.nbytes)
    for memory, whole in (("20%", False), ("100%", True), (None, True)):
        pinned = loading.pinned_store(store, memory, lambda done, total: told.append((done, total)))
        assert pinned.pinned is whole
        assert 0 < pinned.pinned_bytes <= store.nbytes * (1 if whole else 0.4)
        assert told[-1] == (pinned.pinned_bytes, pinned.pinned_bytes)
        assert torch.equal(pinned.record(0, 3), store.record(0, 3))
    with pytest.raises(ExpertFlowError, match="--host-memory 'lots' cannot be read"):
        loading.pinned_store(store, "lots")


@pytest.mark.parametrize("family", [VISION, TEXT, "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 4])
def test_needs_bound_what_is_built(family, rows, folders):
    options = FastOptions(rows=rows, room=100, prefill_tokens=150)
    config, store = read_config(folders / family), ExpertStore(CheckpointReader(folders / family))
    needs = fast_needs(config, store, torch.float32, options, 4)
    engine = expertflow_quant.load(folders / family, fast=True, options=options)
    assert needs.backbone_bytes == backbone_bytes(engine.model)
    assert needs.kv_bytes == engine.runner.kv.nbytes
    tokens, prompts = longest_pass(options)
    assert (tokens, prompts) == ((100, 1) if rows == 1 else (150, 4))
    assert needs.prefill_bytes > engine.runner.streamed.scratch_bytes(tokens, torch.float32)
    assert needs.graph_bytes > engine.runner.resident.table_bytes + rows * tiny.VOCABULARY * 4
    assert needs.expert_bytes <= engine.device_expert_bytes <= needs.expert_bytes + needs.staging_bytes


def test_images_and_scores_take_more(folders):
    store = ExpertStore(CheckpointReader(folders / VISION))
    config, options = read_config(folders / VISION), FastOptions(rows=1, room=200_000)

    def scratch(dtype, patches):
        return fast_needs(config, store, dtype, options, patches).prefill_bytes

    assert scratch(torch.bfloat16, 0) < scratch(torch.bfloat16, 4)
    assert scratch(torch.float32, 4) > 200_000 * 200_000 * 4  # float32 has no attention without scores


def test_weights_have_the_dtype_that_was_asked_for_or_the_models(folders):
    config = read_config(SHIPPED)
    assert weights_dtype(config, None) == weights_dtype(config, "auto") == torch.bfloat16
    assert weights_dtype(config, "float16") == weights_dtype(config, torch.float16) == torch.float16


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    st.integers(3, 40),
    st.integers(0, 80_000),
    st.integers(0, 200_000),
)
def test_slots_and_staging_stay_within_what_is_left(sizes, experts, left, wanted):
    layers = [LayerRecords((256 * size,) * experts, 1) for size in sizes]
    total, largest = sum(sum(layer.nbytes) for layer in layers), 256 * max(sizes)
    needs = Needs(7, 1, 2, 3, 11, 13, largest, total, largest, 17, 19)
    memory, wanted = needs.smallest_total + 256 * left, max(2 * largest, 256 * wanted)
    plan, budget = share(memory, needs, layers, wanted)
    room = share_expert_memory(layers, budget)
    assert sum(parts(plan)) + plan.experts <= plan.total == memory
    assert room.slot_bytes == plan.experts
    assert (room.slot_bytes == total) == (min(wanted, memory - needs.fixed_bytes) >= total)
    assert room.ring_slots * largest <= plan.staging
    assert plan.experts + plan.staging <= max(wanted, total + largest)


@pytest.mark.parametrize(("family", "images"), [(VISION, True), (TEXT, False)])
@pytest.mark.parametrize(("room", "rows", "tokens", "prompts"), [(250, 1, 250, 1), (100, 4, 250, 2), (40, 2, 80, 2)])
def test_the_longest_prompts_fill_their_rows(family, images, room, rows, tokens, prompts, folders):
    encoder = PromptEncoder(load_processor(folders / family), read_config(folders / family))
    encoder.room = room
    made = longest_prompts(encoder, room, rows, tokens)
    assert len(made) == prompts
    assert room - 8 <= made.width + NEW_TOKENS <= room
    assert all((count > 0) is images for count in made.image_tokens)
    if images and room == 250:
        assert made.image_tokens[0] >= 3 * 64  # 64 tokens are the largest image that the processor makes


def test_patches_behind_a_token(folders):
    for family, patches in ((VISION, 4), (TEXT, 0)):
        config = read_config(folders / family)
        assert patches_per_token(PromptEncoder(load_processor(folders / family), config), config) == patches
    config = read_config(SHIPPED)
    assert patches_per_token(PromptEncoder(load_processor(SHIPPED), config), config) == 4


CHECKED = """
import json, sys, torch
import expertflow_quant
from expertflow_quant.runtime import memory_device
from expertflow_quant.runtime.longest import longest_prompts
from expertflow_quant.runtime.memory import MemoryPlanError
from expertflow_quant.runtime.prompts import PromptEncoder
from expertflow_quant.samples import make_items

folder, rows, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = {"device": "cuda", "rows": rows, "context": context}
try:
    expertflow_quant.load(folder, gpu_memory="1MiB", **options)
except MemoryPlanError as error:
    least, refused = error.smallest_total, str(error)
assert torch.cuda.memory_reserved() == 0
measure, built = memory_device.measure_peak, []

def measured(run, device):
    built.append(torch.cuda.max_memory_reserved())
    return measure(run, device)

memory_device.measure_peak = measured
engine = expertflow_quant.load(folder, gpu_memory=least + 2**19, **options)
items = make_items("chart", "test", max(8, rows), seed=3)
answers = engine.generate([item.messages for item in items], 16, temperature=1.0, top_p=0.9, seed=1)
plan = engine.memory_plan
print(json.dumps({
    "total": plan.total, "reservable": plan.reservable, "built": built[0], "peak": torch.cuda.max_memory_reserved(),
    "driver": memory_device.driver_bytes(), "experts": engine.device_expert_bytes, "all": engine.expert_bytes,
    "tokens": [answer.completion_tokens for answer in answers], "refused": refused,
    "image_tokens": [answer.image_tokens for answer in answers],
}))
"""


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize(("rows", "context"), [(1, 2048), (4, 1024), (32, 512)])
def test_on_a_gpu_the_promise_is_kept(rows, context, tmp_path):
    expertflow_quant.quantize_model(SHIPPED, tmp_path / "out", method="rtn", plan="int4-g32")
    found = told_by(CHECKED, tmp_path / "out", rows, context)
    print(found)
    assert max(found["built"], found["peak"]) <= found["reservable"] < found["total"]
    assert found["peak"] + found["driver"] <= found["total"]
    assert 0 < found["experts"] < found["all"]
    assert min(found["tokens"]) >= 1
    assert min(found["image_tokens"]) > 0
    assert "does not hold this model, which needs at least" in found["refused"]


@pytest.mark.cuda
def test_on_a_gpu_some_records_in_files_take_the_plain_path(folders, caplog):
    with caplog.at_level(logging.WARNING, logger="expertflow_quant"):
        engine = expertflow_quant.load(folders / TEXT, device="cuda", dtype=torch.float32, host_memory="20KiB")
    assert "--host-memory" in caplog.text
    assert not engine.model.expert_store.pinned
    asked = [[{"role": "user", "content": "How many?"}]]
    plain = expertflow_quant.load(folders / TEXT, device="cuda", dtype=torch.float32, fast=False)
    assert plain.model.expert_store.pinned
    assert engine.generate(asked, 6)[0].token_ids == plain.generate(asked, 6)[0].token_ids
