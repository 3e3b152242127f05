"""The plan's numbers that only a CUDA device can give, and the limit that makes the plan a promise."""

import math
from collections.abc import Callable

import torch

from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.runtime.memory import DRIVER_BYTES, MemoryPlanError


def measure_peak(run: Callable[[], object], device: torch.device | str = "cuda") -> int:
    """Bytes that ``run`` needs on ``device`` beside what is allocated when it begins.

    The peak of what torch reserves while it runs, remainders of allocations included, less what was allocated
    before: not less than what it takes anywhere else in the same process. For the scratch of a prefill or the
    pools of graphs; memory that ``run`` leaves allocated counts. Raises what ``run`` raises.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_reserved(device)) - int(before)


def driver_bytes(device: torch.device | str = "cuda") -> int:
    """Bytes of ``device`` in use beside what torch reserved: the CUDA context, if no other program uses it."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def limit_process(total_bytes: int, device: torch.device | str, driver: int = DRIVER_BYTES) -> None:
    """From now on this process cannot take more than ``total_bytes`` of ``device``: torch raises OutOfMemoryError.

    ``driver`` of it are the CUDA context, which torch does not count; the rest is what torch may reserve. Raises
    MemoryPlanError when that is nothing, or when other programs have left less of the device than this process
    may still take.
    """
    free, whole = torch.cuda.mem_get_info(device)
    reserved = int(torch.cuda.memory_reserved(device))
    limit = total_bytes - driver
    if limit <= 0:
        raise MemoryPlanError(
            f"--gpu-memory {format_bytes(total_bytes)} leaves nothing beside a CUDA context of {format_bytes(driver)}: "
            "raise it",
            smallest_total=driver + 1,
        )
    if limit > free + reserved:
        raise MemoryPlanError(
            f"--gpu-memory {format_bytes(total_bytes)}: other programs leave {format_bytes(free)} of the device's "
            f"{format_bytes(whole)} beside what this one holds: end them or give at most "
            f"{(free + reserved + driver) // 2**20} MiB"
        )
    index = torch.device(device).index
    torch.cuda.set_per_process_memory_fraction(
        fraction_of(limit, whole), torch.cuda.current_device() if index is None else index
    )


def fraction_of(limit: int, whole: int) -> float:
    """The largest float whose product with ``whole``, rounded down, is at most ``limit``; at most 1."""
    fraction = min(1.0, limit / whole)
    while int(fraction * whole) > limit:
        fraction = math.nextafter(fraction, 0.0)
    return fraction
