"""The plan behind ``--gpu-memory 8GiB``: what of it goes where, before anything is on the device.

The promise is about the peak that a process holds: what torch's allocator reserves from the device
(``torch.cuda.max_memory_reserved``) and, beside that, the CUDA context. Everything but the experts has a size that
the model and the settings fix; the experts get what is left, and when that is too little nothing is loaded. The
numbers come from the host (memory_needs.py), so a plan needs no device.
"""

import dataclasses
from dataclasses import dataclass, fields

from rich import box
from rich.table import Table

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError, format_bytes, format_bytes_up, parse_budget

MiB = 2**20
DRIVER_BYTES = 832 * MiB
"""A CUDA context with the modules of torch, cuBLAS and our own kernels, compiled layers and instantiated graphs, which
torch's allocator does not see: 767 MiB on an H100 after captured steps had run (``memory_device.driver_bytes``)."""
WORKSPACE_BYTES = 128 * MiB
"""cuBLAS's workspaces, which torch takes from its own allocator: 32 MiB a stream on Hopper, 8 MiB before; four
streams (compute, capture, copies, prefetch)."""
FRAGMENTATION_BYTES = 256 * MiB
"""Reserved and not used: torch takes 20 MiB for every batch of tensors between 1 and 10 MiB and 2 MiB for smaller
ones, and what one stream freed stays with it. A dozen such remainders."""
RESERVE_BYTES = WORKSPACE_BYTES + FRAGMENTATION_BYTES


class MemoryPlanError(BudgetError):
    """A device memory that does not hold the model.

    ``smallest_total`` bytes would be enough; at the given memory ``largest_context`` tokens a row would fit, or
    ``most_rows`` rows (a power of two) of the same context; 0 where fewer do not help.
    """

    def __init__(self, message: str, smallest_total: int = 0, largest_context: int = 0, most_rows: int = 0) -> None:
        super().__init__(message)
        self.smallest_total = smallest_total
        self.largest_context = largest_context
        self.most_rows = most_rows


@dataclass(frozen=True)
class Needs:
    """What has to be on the device, in bytes where not said otherwise.

    ``backbone_bytes``: all weights but the experts'. ``kv_bytes_per_token``: all layers, one row. ``rows``: of the
    largest batch. ``context``: tokens a row keeps in its KV cache. ``prefill_bytes``: scratch of the longest prefill,
    images included. ``graph_bytes``: private pools of the captured graphs. ``staging_bytes``: room that streamed
    experts pass through. ``expert_bytes``: all records; ``minimum_expert_bytes``: the fewest that work.
    ``reserve_bytes``, ``driver_bytes``: see RESERVE_BYTES, DRIVER_BYTES. Raises ExpertFlowError for numbers below
    zero (rows and context: below one) and for a minimum above all experts.
    """

    backbone_bytes: int
    kv_bytes_per_token: int
    rows: int
    context: int
    prefill_bytes: int
    graph_bytes: int
    staging_bytes: int
    expert_bytes: int
    minimum_expert_bytes: int
    reserve_bytes: int = RESERVE_BYTES
    driver_bytes: int = DRIVER_BYTES

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name in ("rows", "context"))
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ExpertFlowError(f"{field.name} {value!r} must be a whole number of at least {least}")
        if self.minimum_expert_bytes > self.expert_bytes:
            raise ExpertFlowError(
                f"minimum_expert_bytes {self.minimum_expert_bytes} is more than all experts, {self.expert_bytes}: "
                "give the smallest cache that works"
            )

    @property
    def kv_bytes(self) -> int:
        """KV cache of all rows."""
        return self.kv_bytes_per_token * self.rows * self.context

    @property
    def fixed_bytes(self) -> int:
        """Everything but the experts."""
        return sum(nbytes for _, nbytes, _ in self.parts())

    @property
    def smallest_total(self) -> int:
        """The smallest memory that a plan accepts."""
        return self.fixed_bytes + self.minimum_expert_bytes

    def parts(self) -> list[tuple[str, int, str]]:
        """Everything but the experts, as (name, bytes, what it is)."""
        return [
            ("backbone", self.backbone_bytes, "weights besides the experts"),
            ("KV cache", self.kv_bytes, f"{self.rows} rows of {self.context} tokens"),
            ("prefill", self.prefill_bytes, "scratch of the longest prompt"),
            ("graphs", self.graph_bytes, "pools of the captured decode steps"),
            ("staging", self.staging_bytes, "room that streamed experts pass through"),
            ("reserve", self.reserve_bytes, "workspaces, remainders of allocations"),
            ("CUDA context", self.driver_bytes, "driver and kernels"),
        ]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of every part; they add up to at most ``total``. ``experts`` is the budget of the slots. ``reservable``
    is what torch may reserve: all but the CUDA context."""

    needs: Needs
    total: int
    experts: int

    @property
    def backbone(self) -> int:
        return self.needs.backbone_bytes

    @property
    def kv(self) -> int:
        return self.needs.kv_bytes

    @property
    def prefill(self) -> int:
        return self.needs.prefill_bytes

    @property
    def graphs(self) -> int:
        return self.needs.graph_bytes

    @property
    def staging(self) -> int:
        return self.needs.staging_bytes

    @property
    def reserve(self) -> int:
        return self.needs.reserve_bytes

    @property
    def driver(self) -> int:
        return self.needs.driver_bytes

    @property
    def free(self) -> int:
        """What nobody needs."""
        return self.total - self.needs.fixed_bytes - self.experts

    @property
    def reservable(self) -> int:
        return self.total - self.needs.driver_bytes

    def table(self) -> Table:
        """The plan for a person: what takes how much, and for what."""
        shown = Table(title="device memory", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        shown.add_column("part", no_wrap=True)
        shown.add_column("bytes", justify="right", no_wrap=True)
        shown.add_column("for")
        share = self.experts / self.needs.expert_bytes if self.needs.expert_bytes else 1.0
        for name, nbytes, what in (
            *self.needs.parts(),
            ("experts", self.experts, f"{share:.0%} of {format_bytes(self.needs.expert_bytes)}"),
            ("free", self.free, "nothing"),
        ):
            if nbytes or name == "experts":
                shown.add_row(name, format_bytes(nbytes), what)
        shown.add_section()
        shown.add_row("all", format_bytes(self.total), "--gpu-memory")
        return shown


def parse_gpu_memory(value: int | str, device_bytes: int) -> int:
    """Bytes that ``--gpu-memory value`` promises on a device of ``device_bytes``: "8GiB", "40%", 8589934592.

    Raises BudgetError for what cannot be read, MemoryPlanError for more than the device has.
    """
    nbytes = parse_budget(value, device_bytes, "--gpu-memory", "the device's memory")
    if nbytes > device_bytes:
        raise MemoryPlanError(
            f"--gpu-memory {value!r} is {format_bytes(nbytes)}, the device has {format_bytes(device_bytes)}: give at "
            "most 100%"
        )
    return nbytes


def plan_memory(total_bytes: int, needs: Needs) -> MemoryPlan:
    """Everything in ``needs`` and as many experts as fit beside it into ``total_bytes``.

    Raises MemoryPlanError, with what takes how much and what would fit, when less is left for the experts than
    their minimum.
    """
    left = total_bytes - needs.fixed_bytes
    if left < needs.minimum_expert_bytes:
        raise _too_small(total_bytes, needs)
    return MemoryPlan(needs, total_bytes, min(left, needs.expert_bytes))


def _too_small(total: int, needs: Needs) -> MemoryPlanError:
    context, rows = _largest_context(total, needs), _most_rows(total, needs)
    remedies = [f"raise --gpu-memory to {format_bytes_up(needs.smallest_total)}"]
    if context:
        remedies.append(f"keep at most {context} tokens a row in the KV cache (now {needs.context})")
    if rows:
        remedies.append(f"run at most {rows} rows at once (now {needs.rows})")
    parts = [*needs.parts(), ("experts", needs.minimum_expert_bytes, "the fewest that work")]
    table = "".join(f"\n  {name:<12} {format_bytes_up(nbytes):>10}  {what}" for name, nbytes, what in parts)
    return MemoryPlanError(
        f"--gpu-memory {format_bytes(total)} does not hold this model, which needs at least "
        f"{format_bytes_up(needs.smallest_total)}:{table}\n{', or '.join(remedies)}",
        needs.smallest_total,
        context,
        rows,
    )


def _largest_context(total: int, needs: Needs) -> int:
    """Tokens a row, fewer than now, with which the minimum fits; 0 if none."""
    return max(0, total - needs.smallest_total + needs.kv_bytes) // max(1, needs.kv_bytes_per_token * needs.rows)


def _most_rows(total: int, needs: Needs) -> int:
    """A power of two of rows, fewer than now, with which the minimum fits; 0 if none."""
    row = dataclasses.replace(needs, rows=1).kv_bytes
    fitting = max(0, total - needs.smallest_total + needs.kv_bytes) // max(1, row)
    return 1 << (fitting.bit_length() - 1) if fitting else 0
