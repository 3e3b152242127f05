"""What this machine can do at most, measured in the run whose figures it bounds: link, memory, products, launches.

Each is the median of repeats, timed by events on a GPU. On the CPU, where experts are copied from memory to memory, the
same measurements stand for the link and the device, with smaller sizes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eval.speed.systems import Clock

REPEATS = 9
LINK_BYTES, MEMORY_BYTES, SIDE = 512 * 2**20, 1 << 30, 8192
CPU_BYTES, CPU_SIDE = 16 * 2**20, 256
_SYNCS = 100
_BESIDE = 200
"""Products of 45 microseconds: several times as long as the reads beside them."""


@dataclass(frozen=True)
class Ceilings:
    """``link_gbs``: host to device by the copy engine; ``kernel_link_gbs``: the same way by a kernel that reads host
    memory, ``beside_gbs``: that while products run on another stream (None where they cannot be measured);
    ``memory_gbs``: device to device, read and written bytes both counted; ``product_tflops``: one large bf16 product;
    ``launch_sync_us``: one small kernel and the wait for it. GB are 10^9 bytes."""

    link_gbs: float
    kernel_link_gbs: float | None
    beside_gbs: float | None
    memory_gbs: float
    product_tflops: float
    launch_sync_us: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """All ceilings of ``device``; a few seconds, and a gigabyte or two for their time."""
    on_gpu = device.type == "cuda"
    return Ceilings(
        link_gbs=_link(device, LINK_BYTES if on_gpu else CPU_BYTES),
        kernel_link_gbs=_kernel_link(device, busy=False) if on_gpu else None,
        beside_gbs=_kernel_link(device, busy=True) if on_gpu else None,
        memory_gbs=_memory(device, MEMORY_BYTES if on_gpu else CPU_BYTES),
        product_tflops=_product(device, SIDE if on_gpu else CPU_SIDE),
        launch_sync_us=_launch_and_sync(device),
    )


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of ``work`` on ``device``, the median of ``repeats`` after two that are not counted."""
    for _ in range(2):
        work()
    clock = Clock(device)
    for _ in range(repeats):
        work()
        clock.mark()
    return statistics.median(clock.seconds())


def _link(device: torch.device, nbytes: int) -> float:
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), device) / 1e9


def kernel_reads(device: torch.device, records: int, nbytes: int) -> tuple[Callable[[], None], Tensor]:
    """A call that copies ``records`` records of ``nbytes`` from host memory as a decode step's misses are, by the
    library's fill, and the device memory [records, nbytes] that they arrive in. Raises ImportError without Triton."""
    from expertflow_quant.offload.fill import fill

    source = torch.ones(records, nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(records, nbytes, dtype=torch.uint8, device=device)
    todo: Any = SimpleNamespace(
        todo_src=torch.tensor([row.data_ptr() for row in source], device=device),
        todo_dst=torch.tensor([row.data_ptr() for row in target], device=device),
        todo_nbytes=torch.full((records,), nbytes, dtype=torch.int32, device=device),
        todo_count=torch.full((1,), records, dtype=torch.int32, device=device),
        memory=source,  # addresses alone keep nothing alive
    )
    return (lambda: fill(todo)), target


def _kernel_link(device: torch.device, busy: bool, records: int = 32, nbytes: int = 2457600) -> float | None:
    """With records as large as Qwen3-30B-A3B's in int4; ``busy``: beside products that read all of device memory."""
    try:
        read, _ = kernel_reads(device, records, nbytes)
        if not busy:
            return records * nbytes / median_seconds(read, device) / 1e9
        matrix = torch.randn(SIDE, SIDE, device=device).to(torch.bfloat16)
        vector, side = torch.randn(SIDE, 1, device=device).to(torch.bfloat16), torch.cuda.Stream(device)
        seconds = _beside(read, matrix, vector, side)
        return records * nbytes / statistics.median(seconds) / 1e9 if seconds else None
    except ImportError:
        return None


def _beside(read: Callable[[], None], matrix: Tensor, vector: Tensor, side: torch.cuda.Stream) -> list[float]:
    """Seconds of each ``read`` while ``side`` multiplies one row by a large matrix, over and over."""
    seconds = []
    for _ in range(REPEATS):
        clock = Clock(matrix.device)  # waits for both streams
        with torch.cuda.stream(side):
            for _ in range(_BESIDE):
                torch.mm(matrix, vector)
        clock.mark()
        read()
        clock.mark()
        lasted = clock.seconds()[1]
        if not side.query():  # otherwise the products ended first
            seconds.append(lasted)
    return seconds


def _memory(device: torch.device, nbytes: int) -> float:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), device) / 1e9


def _product(device: torch.device, side: int) -> float:
    matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
    return 2 * side**3 / median_seconds(lambda: matrix @ matrix, device) / 1e12


def _launch_and_sync(device: torch.device) -> float:
    number = torch.zeros(8, device=device)

    def once() -> Tensor:
        number.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return number

    for _ in range(5):
        once()
    start = time.perf_counter()
    for _ in range(_SYNCS):
        once()
    return (time.perf_counter() - start) / _SYNCS * 1e6
