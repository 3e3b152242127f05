"""The plan behind --gpu-memory: it never exceeds what was given, and its remedies work when they are followed."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError, format_bytes_up, parse_budget
from expertflow_quant.runtime.memory import DRIVER_BYTES, RESERVE_BYTES, MemoryPlanError, Needs, parse_gpu_memory
from expertflow_quant.runtime.memory import plan_memory as plan
from expertflow_quant.runtime.memory_device import driver_bytes, fraction_of, limit_process, measure_peak

GiB, MiB = 2**30, 2**20
BYTES = st.integers(0, 2**36)
QWEN = Needs(
    backbone_bytes=3 * GiB,
    kv_bytes_per_token=48 * 2 * 4 * 128 * 2,
    rows=8,
    context=4096,
    prefill_bytes=400 * MiB,
    graph_bytes=100 * MiB,
    staging_bytes=80 * MiB,
    expert_bytes=15 * GiB,
    minimum_expert_bytes=20 * MiB,
)


@st.composite
def needs(draw):
    experts = draw(BYTES)
    return Needs(
        backbone_bytes=draw(BYTES),
        kv_bytes_per_token=draw(st.integers(0, 2**20)),
        rows=draw(st.integers(1, 64)),
        context=draw(st.integers(1, 2**17)),
        prefill_bytes=draw(BYTES),
        graph_bytes=draw(BYTES),
        staging_bytes=draw(BYTES),
        expert_bytes=experts,
        minimum_expert_bytes=draw(st.integers(0, experts)),
        reserve_bytes=draw(BYTES),
        driver_bytes=draw(BYTES),
    )


def by_hand(need):
    """All that is not experts, written out once more."""
    weights = need.backbone_bytes + need.rows * need.context * need.kv_bytes_per_token
    scratch = need.prefill_bytes + need.graph_bytes + need.staging_bytes
    return weights + scratch + need.reserve_bytes + need.driver_bytes


@given(needs(), st.integers(0, 2**37))
def test_parts_add_up_and_stay_within_the_total(need, above):
    total = by_hand(need) + need.minimum_expert_bytes + above
    made = plan(total, need)
    parts = (made.backbone, made.kv, made.prefill, made.graphs, made.staging, made.reserve, made.driver, made.experts)
    assert min(parts) >= 0
    assert sum(parts) + made.free == total
    assert need.minimum_expert_bytes <= made.experts <= need.expert_bytes
    assert made.free == 0 or made.experts == need.expert_bytes
    assert made.reservable == total - made.driver


@given(needs(), st.integers(0, 2**37), st.integers(0, 2**37))
def test_more_memory_never_gives_fewer_experts(need, one, other):
    less, more = sorted((one, other))
    least = by_hand(need) + need.minimum_expert_bytes
    assert plan(least + less, need).experts <= plan(least + more, need).experts


@given(needs(), st.floats(0, 1, exclude_max=True))
def test_what_an_error_says_would_work_works_and_no_less_does(need, share):
    least = by_hand(need) + need.minimum_expert_bytes
    total = int(least * share)
    if total >= least:
        return
    with pytest.raises(MemoryPlanError) as caught:
        plan(total, need)
    error = caught.value
    assert error.smallest_total == least
    assert plan(parse_budget(format_bytes_up(least), least), need).experts >= need.minimum_expert_bytes
    if least:
        with pytest.raises(MemoryPlanError):
            plan(least - 1, need)
    for name, found, more in [
        ("context", error.largest_context, error.largest_context + 1),
        ("rows", error.most_rows, 2 * error.most_rows or 1),
    ]:
        assert found < getattr(need, name)
        if found:
            assert plan(total, dataclasses.replace(need, **{name: found}))
        if more < getattr(need, name):
            with pytest.raises(MemoryPlanError):
                plan(total, dataclasses.replace(need, **{name: more}))


def test_the_error_shows_the_numbers_and_what_to_do():
    with pytest.raises(MemoryPlanError) as caught:
        plan(4 * GiB + 200 * MiB, QWEN)
    text = str(caught.value)
    assert isinstance(caught.value, BudgetError)
    assert text.startswith("--gpu-memory 4.2 GiB does not hold this model, which needs at least 7.8 GiB:\n")
    for part in ("backbone", "KV cache", "prefill", "graphs", "staging", "reserve", "CUDA context", "experts"):
        assert re.search(rf"^  {part} +[0-9.]+ [KMG]iB  \w", text, re.MULTILINE), part
    assert re.search(r"KV cache +3\.0 GiB  8 rows of 4096 tokens", text)
    assert "raise --gpu-memory to 7.8 GiB, or keep at most " not in text  # no context is small enough
    assert text.endswith("raise --gpu-memory to 7.8 GiB")


def test_the_error_offers_less_context_and_fewer_rows_where_they_help():
    with pytest.raises(MemoryPlanError) as caught:
        plan(6 * GiB, QWEN)
    context = caught.value.largest_context
    assert 1000 < context < 4096
    assert str(caught.value).endswith(
        f"raise --gpu-memory to 7.8 GiB, or keep at most {context} tokens a row in the KV cache (now 4096), "
        "or run at most 2 rows at once (now 8)"
    )


def test_a_quarter_of_a_real_model_on_a_small_card():
    made = plan(12 * GiB, QWEN)
    assert made.experts == 12 * GiB - (6 * GiB + 580 * MiB + RESERVE_BYTES + DRIVER_BYTES)
    assert made.free == 0
    assert plan(80 * GiB, QWEN).experts == QWEN.expert_bytes


def test_the_table_lists_what_takes_memory():
    console = Console(width=100)
    with console.capture() as shown:
        console.print(plan(12 * GiB, dataclasses.replace(QWEN, graph_bytes=0)).table())
    lines = [line.split() for line in shown.get().splitlines() if line.split()]
    assert ["backbone", "3.0", "GiB", "weights", "besides", "the", "experts"] in lines
    assert ["experts", "4.3", "GiB", "29%", "of", "15.0", "GiB"] in lines
    assert ["all", "12.0", "GiB", "--gpu-memory"] in lines
    assert not any(line[0] in ("graphs", "free") for line in lines)


def test_a_dense_model_needs_no_experts():
    made = plan(20 * GiB, dataclasses.replace(QWEN, expert_bytes=0, minimum_expert_bytes=0))
    assert (made.experts, made.free > 0) == (0, True)
    assert made.table().row_count > 5


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"rows": 0}, "rows 0 must be a whole number of at least 1"),
        ({"context": True}, "context True"),
        ({"prefill_bytes": -1}, "prefill_bytes -1 must be a whole number of at least 0"),
        ({"graph_bytes": 1.5}, "graph_bytes 1.5"),
        ({"minimum_expert_bytes": 16 * GiB}, "more than all experts"),
    ],
)
def test_numbers_that_cannot_be_are_refused(change, part):
    with pytest.raises(ExpertFlowError, match=part):
        dataclasses.replace(QWEN, **change)


def test_memory_as_people_write_it():
    assert parse_gpu_memory("8GiB", 24 * GiB) == 8 * GiB
    assert parse_gpu_memory("40%", 10 * GiB) == 4 * GiB
    assert parse_gpu_memory(5, 10) == 5
    with pytest.raises(MemoryPlanError, match=r"'25GiB' is 25.0 GiB, the device has 24.0 GiB: give at most 100%"):
        parse_gpu_memory("25GiB", 24 * GiB)
    with pytest.raises(BudgetError, match=r"--gpu-memory 'much' cannot be read: give .*a share of the device's memory"):
        parse_gpu_memory("much", 24 * GiB)
    with pytest.raises(BudgetError, match="--gpu-memory '101%' is more than the device's memory"):
        parse_gpu_memory("101%", 24 * GiB)


@given(st.integers(1, 2**40), st.floats(0.0001, 2))
def test_the_fraction_that_torch_gets_means_no_more_than_the_limit(whole, share):
    limit = max(1, int(whole * share))
    fraction = fraction_of(limit, whole)
    assert 0 < fraction <= 1
    assert int(fraction * whole) <= limit
    assert int(fraction * whole) >= min(limit, whole) - 1


@pytest.fixture
def device(monkeypatch):
    """A device of 24 GiB of which 10 are free, 2 reserved by us; says which fraction was set."""
    told = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GiB, 24 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GiB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: told.append(args))
    return told


def test_the_limit_leaves_room_for_the_context(device):
    limit_process(8 * GiB, "cuda:0")
    ((fraction, name),) = device
    assert name == 0
    assert 8 * GiB - DRIVER_BYTES - 1 <= fraction * 24 * GiB <= 8 * GiB - DRIVER_BYTES


def test_memory_that_others_took_is_refused_with_what_is_left(device):
    with pytest.raises(MemoryPlanError, match=r"leave 10.0 GiB of the device's 24.0 GiB.*at most (\d+) MiB") as error:
        limit_process(20 * GiB, "cuda:0")
    limit_process(int(re.search(r"at most (\d+) MiB", str(error.value))[1]) * MiB, "cuda:0")
    with pytest.raises(MemoryPlanError, match=r"leaves nothing beside a CUDA context of 832\.0 MiB"):
        limit_process(DRIVER_BYTES, "cuda:0")
    assert len(device) == 1


@pytest.mark.cuda
def test_on_a_gpu_the_peak_of_a_piece_of_work_is_measured():
    held = torch.zeros(64 * MiB, dtype=torch.uint8, device="cuda")

    def work():
        one = torch.zeros(100 * MiB, dtype=torch.uint8, device="cuda")
        two = torch.zeros(50 * MiB, dtype=torch.uint8, device="cuda")
        del one, two

    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert 150 * MiB <= measure_peak(work) <= 190 * MiB + unused
    assert held.numel() == 64 * MiB
    assert 100 * MiB < driver_bytes()


@pytest.mark.cuda
def test_on_a_gpu_more_than_was_promised_fails():
    torch.cuda.empty_cache()
    try:
        limit_process(DRIVER_BYTES + torch.cuda.memory_reserved() + 256 * MiB, "cuda")
        assert torch.zeros(128 * MiB, dtype=torch.uint8, device="cuda").numel() == 128 * MiB
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.zeros(512 * MiB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
