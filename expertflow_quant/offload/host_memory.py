"""Host memory: how much of it records may take, where pinned slabs begin and end, and advice about mapped pages."""

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

HOST_RESERVE_BYTES = 2 * 2**30
"""Left to everything else when pinned memory takes what is available: this process's own heap (tokenizer, images,
answers) grows by some hundred MiB while it serves, and a machine whose last page is pinned cannot even swap."""
SLAB_BYTES = 256 * 2**20
SLAB_RECORDS = 8
"""A slab holds at least so many of the largest records, so that its unused end is at most an eighth of it."""

_MADV_PAGEOUT = 21
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Slab:
    """One pinned allocation of ``nbytes``, a power of two, for ``records`` consecutive records."""

    nbytes: int
    records: int


def plan_slabs(sizes: Sequence[int]) -> list[Slab]:
    """Slabs that hold records of ``sizes`` bytes in this order, without gaps inside a slab.

    Every slab is a power of two, because torch's pinned allocator rounds a request up to one and the rest of it
    would be pinned for nothing. The last records get smaller slabs.
    """
    slabs: list[Slab] = []
    largest, left, start = max(sizes, default=0), sum(sizes), 0
    while start < len(sizes):
        nbytes = _slab_bytes(left, sizes[start], largest)
        used, end = 0, start
        while end < len(sizes) and used + sizes[end] <= nbytes:
            used, end = used + sizes[end], end + 1
        slabs.append(Slab(nbytes, end - start))
        left, start = left - used, end
    return slabs


def available_bytes(root: Path | str = "/") -> int:
    """Host memory that can be taken without swapping: of the machine, and of the control group around this process.

    Memory that only caches files counts as available. ``root`` is where proc and sys are mounted.
    """
    rest = [_group_rest(Path(root) / folder, most, used) for folder, most, used in _CGROUPS]
    return min([_machine_available(Path(root)), *(nbytes for nbytes in rest if nbytes is not None)])


def release(mapped: Iterable[Tensor]) -> None:
    """Advise the system that nobody will read these bytes soon: pages of a mapped file leave the memory.

    Neighbours are released in one, because the system keeps pages in groups of up to some hundred and lets only
    whole groups go. Advice only: whatever the memory is, its content stays, and where the system does not know
    this advice (before Linux 5.4, other systems, files of other owners) pages stay until their memory is wanted.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sorted((each.data_ptr(), each.data_ptr() + each.numel()) for each in mapped):
        if spans and start == spans[-1][1]:
            start = spans.pop()[0]
        spans.append((start, end))
    for start, end in spans:
        _page_out(start, end)


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """``target`` gets the bytes of ``source``, both uint8 ``[n]`` on the host in one piece.

    On this thread alone and without the interpreter's lock, where ``Tensor.copy_`` starts as many threads again
    for every thread that copies.
    """
    ctypes.memmove(target.data_ptr(), source.data_ptr(), min(target.numel(), source.numel()))


def _slab_bytes(left: int, first: int, largest: int) -> int:
    whole = max(SLAB_BYTES, _power_of_two(SLAB_RECORDS * largest))
    if left >= whole:
        return whole
    rounded = _power_of_two(left)
    return rounded if rounded - left <= rounded // 8 else max(rounded // 2, _power_of_two(first))


def _power_of_two(nbytes: int) -> int:
    """The smallest power of two that is at least ``nbytes``."""
    return 1 << (nbytes - 1).bit_length()


def _machine_available(root: Path) -> int:
    known = _table(root / "proc/meminfo")
    if "MemAvailable" in known:
        return known["MemAvailable"] * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_rest(folder: Path, most: str, used: str) -> int | None:
    """What the control group leaves; None where it sets no limit."""
    try:
        limit, taken = int((folder / most).read_text()), int((folder / used).read_text())
    except (OSError, ValueError):  # no such controller, or a limit of "max"
        return None
    return max(0, limit - taken + _table(folder / "memory.stat").get("inactive_file", 0))


def _table(path: Path) -> dict[str, int]:
    """First number of every line by its first word, colon removed; empty when there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _page_out(start: int, end: int) -> None:
    madvise = _madvise()
    page = os.sysconf("SC_PAGE_SIZE")
    # Whole pages only. The last one stays: what comes next begins in it.
    first, last = start // page * page, end // page * page
    if madvise is not None and last > first:
        madvise(first, last - first, _MADV_PAGEOUT)


@cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
