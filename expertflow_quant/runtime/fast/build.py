"""From a loaded model to a fast runner: probe it, share out the memory, place the experts, capture the graphs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch

from expertflow_quant.formats import RECORD_ALIGNMENT, ExpertFlowError
from expertflow_quant.kernels import UNIT, LayoutTable
from expertflow_quant.models.seams import image_ids
from expertflow_quant.offload.budget import BudgetError, format_bytes, format_bytes_up
from expertflow_quant.offload.layer_policy import BEST_LAYER_POLICY, layer_policy, refuse_without_usage
from expertflow_quant.offload.layer_slots import Pools, plan_layer_slots
from expertflow_quant.offload.policies.named import Usage
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.resident_tables import MOST
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.slots_file import pools_bytes, read_slots
from expertflow_quant.offload.staging import StagingRing
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.experts import attached
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.fast.decode import BUCKETS, DecodeGraphs
from expertflow_quant.runtime.fast.foretold import Foretold
from expertflow_quant.runtime.fast.kv import KVRows
from expertflow_quant.runtime.fast.lookahead import LookAhead, next_gate
from expertflow_quant.runtime.fast.loop import FastRunner
from expertflow_quant.runtime.fast.passes import Routes
from expertflow_quant.runtime.fast.probe import FastPathError, Findings, probe, use_our_attention
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.streamed import StreamedExperts, StreamOptions

CHUNKS = 2
"""Chunks in the staging ring: one is computed while the other arrives."""

STAGING_SHARE = 8
"""Staging takes at most one part in so many of the experts' memory, and never less than two records."""

WARM_WIDTHS = (16, 256, 4096)
"""Prompt lengths that are read once while a runner is built, so that no answer waits for a compiler."""


OFF, NEXT_GATE = "off", "next-gate"
NEXT_GATE_LAYERS = 1
FORETOLD_LAYERS = 8
"""Measured on an H200, ms a step of 48 layers with one fill at a time: 8 layers ahead 6.11, 4: 6.16."""


@dataclass(frozen=True)
class FastOptions:
    """``rows``: most answers under way at once, rounded up to a captured batch size. ``room``: most tokens of a row,
    prompt and answer. ``prefill_tokens``: most tokens of one pass over several prompts; a single prompt may fill its
    row. ``look_ahead``: "off" moves an expert when it is routed; "next-gate" before, if the router of a layer further
    on would want it of the present hidden states; the folder of a trained predictor, if that finds it likely.
    ``look_ahead_layers``: how much further on, by default NEXT_GATE_LAYERS or FORETOLD_LAYERS. ``captured``: the batch
    sizes that have a graph, for a faster start; rows in between take the next larger one. ``slots``: the file of a
    plan's slots for each layer; without one all layers get the same share. ``policy``: which expert makes room, one of
    LAYER_POLICIES; ``usage``: a recorded run, which "static" goes by and counts may start from."""

    rows: int = 8
    room: int = 4096
    prefill_tokens: int = 8192
    stream: StreamOptions | None = None
    compile_layers: bool = True
    look_ahead: str = OFF
    look_ahead_layers: int | None = None
    captured: tuple[int, ...] = BUCKETS
    slots: str | Path | None = None
    policy: str = BEST_LAYER_POLICY
    usage: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("room", 2), ("prefill_tokens", 1), ("look_ahead_layers", 1)):
            if (given := getattr(self, name)) is not None and given < least:
                raise ExpertFlowError(f"{name} {given} must be at least {least}")
        refuse_without_usage(layer_policy(self.policy), self.usage)
        if self.look_ahead not in (OFF, NEXT_GATE) and not Path(self.look_ahead).is_dir():
            raise ExpertFlowError(
                f"look_ahead {self.look_ahead!r} is not known: use {OFF!r}, {NEXT_GATE!r} or the folder of a trained "
                "predictor"
            )
        if self.rows > BUCKETS[-1]:
            raise ExpertFlowError(f"{self.rows} rows are more than the largest graph has: give at most {BUCKETS[-1]}")
        if not set(self.captured) <= set(BUCKETS) or max(self.captured, default=0) < self.rows:
            raise ExpertFlowError(
                f"captured {self.captured} for {self.rows} rows: give some of {BUCKETS}, one of them at least the rows"
            )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes that are captured: those of ``captured`` up to the first that holds all rows."""
        largest = next(bucket for bucket in sorted(self.captured) if bucket >= self.rows)
        return tuple(sorted(bucket for bucket in self.captured if bucket <= largest))


@dataclass(frozen=True)
class ExpertRoom:
    """How a budget for experts is shared: ``slot_bytes`` for slots, and a staging ring of ``ring_slots`` records of up
    to ``record_bytes``, ``chunk`` at a time."""

    slot_bytes: int
    ring_slots: int
    chunk: int
    record_bytes: int


def share_expert_memory(
    layers: Sequence[LayerRecords], budget_bytes: int, planned_bytes: int | None = None
) -> ExpertRoom:
    """Slots and staging that together take at most ``budget_bytes``; ``planned_bytes``: what slots that were planned
    take, where they were.

    Where all experts have slots nothing is staged, and the ring is an empty form; else a chunk of it is up to half of
    what a layer misses. Raises BudgetError below two records of the largest size: room to stage.
    """
    total = sum(sum(layer.nbytes) for layer in layers)
    largest = max(max(layer.nbytes) for layer in layers)
    planned = total if planned_bytes is None else planned_bytes
    if min(budget_bytes, planned) >= total:
        return ExpertRoom(total, 1, 1, RECORD_ALIGNMENT)
    if budget_bytes < 2 * largest:
        raise BudgetError(
            f"expert memory {format_bytes(budget_bytes)} has no room to stage two experts of {format_bytes(largest)}: "
            f"raise --expert-memory to {format_bytes_up(2 * largest)} or use a smaller format"
        )
    # what a layer misses in two halves, if that is little enough: fewer pieces are fewer launches for the host
    held = budget_bytes if budget_bytes < total else planned
    missing = max(math.ceil(len(layer.nbytes) * (1 - held / total)) for layer in layers)
    chunk = max(1, min(math.ceil(missing / CHUNKS) + 1, budget_bytes // STAGING_SHARE // largest // CHUNKS))
    return ExpertRoom(budget_bytes - CHUNKS * chunk * largest, CHUNKS * chunk, chunk, largest)


def build_fast(
    model: Any,
    tokenizer: Any,
    end_ids: frozenset[int],
    expert_budget: int,
    options: FastOptions,
    *,
    routes: Routes | None = None,
    make_ahead: Callable[[Findings], LookAhead] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> FastRunner:
    """A runner for ``model``, which has its ``expert_store`` and lies on its device. ``on_step`` hears what is done.

    Raises FastPathError when the model needs something that the fast path does not have, BudgetError when
    ``expert_budget`` bytes are too few.
    """
    told = on_step or (lambda text: None)
    store: ExpertStore = model.expert_store
    _refuse_records(store)
    device = next(model.parameters()).device
    use_our_attention(model)
    findings = probe(model, device)
    (plan, shared), shares = _placed(store.layers, expert_budget, options.slots), None
    told("placing experts")
    if options.usage is not None:
        shares = Usage.load(options.usage, [len(layer.nbytes) for layer in store.layers]).shares
    resident = ResidentExperts(store, plan, device, policy=options.policy, shares=shares)
    resident.preload()
    ring = StagingRing(device, shared.ring_slots, shared.record_bytes, shared.chunk)
    streamed = StreamedExperts(resident, store, ring, options.stream)
    dtype = next(model.parameters()).dtype
    kv = KVRows(findings.kv, options.buckets[-1], options.room, dtype, device)
    graphs = DecodeGraphs(
        model,
        kv,
        resident,
        streamed,
        findings,
        options.buckets,
        routes=routes,
        ahead=make_ahead(findings) if make_ahead is not None else _ahead(model, options, device),
        compile_layers=options.compile_layers,
    )
    prefill_tokens = max(options.prefill_tokens, options.room)
    runner = FastRunner(graphs, resident, streamed, ring, findings, tokenizer, end_ids, prefill_tokens, routes)
    with _refused_by_name(model):
        graphs.capture(lambda bucket: told(f"compiled steps of {bucket} rows"))
        if device.type == "cuda" and routes is None:
            with passes.on_device(device):
                _warm(runner, options)
            told("read prompts of several lengths once")
    runner.reset_stats()
    return runner


def _placed(
    layers: Sequence[LayerRecords], budget_bytes: int, slots: str | Path | None
) -> tuple[tuple[Pools, ...], ExpertRoom]:
    """The slots of every layer, those of the file ``slots`` if there is one, and how the budget is shared."""
    if slots is None:
        shared = share_expert_memory(layers, budget_bytes)
        # a plan of no slots at all is legal: everything is then read from the host
        return plan_layer_slots(layers, max(1, shared.slot_bytes)), shared
    plan = read_slots(slots, layers)
    shared = share_expert_memory(layers, budget_bytes, taken := pools_bytes(plan))
    if taken > shared.slot_bytes:
        staging = shared.ring_slots * shared.record_bytes
        raise BudgetError(
            f"the slots of {slots} take {format_bytes_up(taken)} and staging {format_bytes_up(staging)}, expert memory "
            f"has {format_bytes(shared.slot_bytes)} for slots: raise --expert-memory, or plan for less"
        )
    return plan, shared


@contextmanager
def _refused_by_name(model: Any) -> Iterator[None]:
    """A model that cannot be compiled or captured, or a machine without a compiler, is no reason to fail where there is
    another path; too little memory is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _failures() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FastPathError(f"{type(model).__name__} could not be compiled or captured: {reason}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What compiling and capturing raise: Triton's own errors are no RuntimeError, nor is a C compiler that failed."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError, SubprocessError
    return RuntimeError, SubprocessError, TritonError


def _refuse_records(store: ExpertStore) -> None:
    """Raises FastPathError for experts that kernels do not read or the cache's controller does not take."""
    for index, (records, layouts) in enumerate(zip(store.layers, store.layouts, strict=True)):
        hidden, intermediate = layouts[0].shape.hidden, layouts[0].shape.intermediate
        if len(records.nbytes) > MOST or hidden % UNIT or intermediate % UNIT:
            raise FastPathError(
                f"layer {index} has {len(records.nbytes)} experts of {hidden} by {intermediate}: the fast path takes "
                f"at most {MOST}, of sizes that are multiples of {UNIT}"
            )
        try:
            LayoutTable.of(layouts, "cpu")
        except ExpertFlowError as error:
            raise FastPathError(str(error)) from error


def _ahead(model: Any, options: FastOptions, device: torch.device) -> LookAhead | None:
    if options.look_ahead == OFF:
        return None
    layers = model.expert_store.layers
    if options.look_ahead == NEXT_GATE:
        names = {module: name for name, module in model.named_modules()}
        top_k = [layer.top_k for layer in layers]
        widths = [layouts[0].shape.hidden for layouts in model.expert_store.layouts]
        guess = next_gate(model, [names[module] for module in attached(model)], top_k, widths)
        return LookAhead(guess, options.look_ahead_layers or NEXT_GATE_LAYERS, device)
    experts = [len(layer.nbytes) for layer in layers]
    predictor = PathPredictor.load(options.look_ahead)
    rows, room = options.buckets[-1], options.room
    foretold = Foretold(predictor, experts, rows, room, image_ids(model.config), device)
    return LookAhead(foretold.guess, options.look_ahead_layers or FORETOLD_LAYERS, device, foretold)


def _warm(runner: FastRunner, options: FastOptions) -> None:
    """Compile what prompts of any length need."""
    rows = {1, min(2, options.rows)}
    for width in sorted({min(width, options.room - 1) for width in WARM_WIDTHS}):
        for count in sorted(rows):
            if count == 1 or count * width <= options.prefill_tokens:
                ids = torch.zeros(count, width, dtype=torch.int64)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                with torch.inference_mode():
                    runner.prefill(Prompts(inputs, (width,) * count, (0,) * count), 0)
