"""What the fill kernel leaves in the slots is the records, and nothing else is touched."""

import pytest
import torch

from expertflow_quant.offload.fill import fill
from expertflow_quant.offload.resident_tables import ResidentTables
from expertflow_quant.offload.slots import LayerRecords


def make(nbytes, device):
    """Tables whose todo list says: record e to slot e; source and target bytes behind them."""
    generator = torch.Generator().manual_seed(0)
    host = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in nbytes]
    if device == "cuda":
        host = [each.pin_memory() for each in host]
    slots = [torch.zeros(n, dtype=torch.uint8, device=device) for n in nbytes]
    layers = [LayerRecords(tuple(nbytes), 1)]
    plan = (tuple((n, nbytes.count(n)) for n in sorted(set(nbytes))),)
    sources, targets = ([each.data_ptr() for each in side] for side in (host, slots))
    tables = ResidentTables(layers, plan, [sources], [targets], device)
    rows = tables.layer(0)
    rows.todo_src[: len(nbytes)] = torch.tensor(sources)
    rows.todo_dst[: len(nbytes)] = torch.tensor(targets)
    rows.todo_nbytes[: len(nbytes)] = torch.tensor(nbytes, dtype=torch.int32)
    return rows, host, slots


@pytest.mark.parametrize(("count", "ahead"), [(0, 0), (1, 0), (3, 0), (3, 1), (3, 2), (3, 99)])
def test_only_what_is_on_the_list_is_copied(count, ahead, device):
    rows, host, slots = make([1024, 256, 768, 512], device)
    rows.todo_count[0] = count
    fill(rows, ahead)
    for entry, (record, slot) in enumerate(zip(host, slots, strict=True)):
        assert torch.equal(slot.cpu(), record if entry < count else torch.zeros_like(record))


@pytest.mark.parametrize(("programs", "block"), [(1, 64), (3, 64), (3, 128), (32, 4096)])
def test_any_number_of_programs_and_any_block_copies_everything(programs, block, device):
    from expertflow_quant.offload.fill_kernel import launch_fill

    rows, host, slots = make([4096, 256, 1280, 1280, 256], device)
    rows.todo_count[0] = 5
    launch_fill(
        rows.todo_src, rows.todo_dst, rows.todo_nbytes, rows.todo_count, programs=programs, block=block, num_warps=4
    )
    for record, slot in zip(host, slots, strict=True):
        assert torch.equal(slot.cpu(), record)


@pytest.mark.parametrize(("ahead", "programs"), [(0, 64), (1, 16), (2, 8), (3, 5), (99, 1)])
def test_fills_ahead_share_the_programs_of_one(ahead, programs, monkeypatch):
    from expertflow_quant.offload import fill_kernel

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **named: None

    monkeypatch.setattr(fill_kernel, "_fill", Kernel())
    rows, _, _ = make([256], "cpu")
    fill_kernel.launch_fill(rows.todo_src, rows.todo_dst, rows.todo_nbytes, rows.todo_count, ahead)
    assert grids == [(programs,)]
