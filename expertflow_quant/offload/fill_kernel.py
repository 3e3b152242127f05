# mypy: disable-error-code="no-untyped-def"
"""The fill kernel: few persistent programs read pinned host records through the link and write them into slots."""

import triton
import triton.language as tl

from expertflow_quant.offload.resident_tables import LayerTables

PROGRAMS = 32  # enough to saturate a PCIe 5 link; more would take processors from the products
BLOCK = 8192  # int32 words that a program has under way; 4096 reached 4 % less of the link beside products
WARPS = 8

ALIGNMENT = tl.constexpr(16)


def launch_fill(layer: LayerTables, programs: int = PROGRAMS, block: int = BLOCK, num_warps: int = WARPS) -> None:
    """``fill.fill`` in one launch."""
    _fill[(programs,)](
        layer.todo_src, layer.todo_dst, layer.todo_nbytes, layer.todo_count, BLOCK=block, num_warps=num_warps
    )


@triton.jit(do_not_specialize_on_alignment=["todo_count"])
def _fill(todo_src, todo_dst, todo_nbytes, todo_count, BLOCK: tl.constexpr):
    """Blocks of all records are dealt out in turn, going on from one record to the next: no program gets more than
    one block above another."""
    programs = tl.num_programs(0)
    block = tl.program_id(0)
    entries = tl.load(todo_count)
    entry = 0
    while entry < entries:
        source = tl.load(todo_src + entry).to(tl.pointer_type(tl.int32))
        target = tl.load(todo_dst + entry).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(source, ALIGNMENT)
        target = tl.multiple_of(target, ALIGNMENT)
        units = tl.load(todo_nbytes + entry) // ALIGNMENT
        words = units * (ALIGNMENT // 4)
        blocks = tl.cdiv(words, BLOCK)
        while block < blocks:
            offset = block * BLOCK + tl.arange(0, BLOCK)
            inside = offset < words
            values = tl.load(source + offset, mask=inside, eviction_policy="evict_first")
            tl.store(target + offset, values, mask=inside)
            block += programs
        block -= blocks
        entry += 1
