"""Recorded routes: which experts every token of a run was sent to, with the gate's weights, and what a cache sees of
them. How they are kept in a file: trace_file.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.trace_file import TraceContent, read_trace_file, write_trace_file

PROMPT_TEXT, PROMPT_IMAGE, GENERATED = 0, 1, 2

Step = list[list[int]]
"""Of every layer the distinct experts that one pass wants, ascending."""

Phase = Literal["decode", "all"]
"""``decode``: generated tokens only. ``all``: prompts too, each in one pass."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """One recorded run of a model, token by token in the order in which they were computed within each item.

    ``token_ids`` int32 [N]; ``kind`` uint8 [N]: PROMPT_TEXT, PROMPT_IMAGE or GENERATED (the token was generated and
    then fed back, so an answer's last token is not there); ``item`` int32 [N], ascending; ``position`` int32 [N] within
    the item; ``experts`` uint8 or int16 (above 256 experts) [N, L, K] in top-k order; ``weights`` float16 [N, L, K],
    the gate's, or [N, L, 0] where they were not kept; ``num_experts`` of a layer; ``tasks``: the task of each item;
    ``meta``: model and settings. Raises ExpertFlowError for values that contradict this.
    """

    token_ids: Tensor
    kind: Tensor
    item: Tensor
    position: Tensor
    experts: Tensor
    weights: Tensor
    num_experts: int
    tasks: tuple[str, ...]
    meta: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_order(self)
        _check_routes(self)

    @classmethod
    def of(
        cls,
        token_ids: Tensor | Sequence[int],
        kind: Tensor | Sequence[int],
        item: Tensor | Sequence[int],
        experts: Tensor,
        num_experts: int,
        tasks: Sequence[str],
        *,
        weights: Tensor | None = None,
        position: Tensor | Sequence[int] | None = None,
        meta: dict[str, str] | None = None,
    ) -> "RoutingTrace":
        """A trace from values of any integer dtype; positions count from 0 in each item unless given, weights may be
        left out."""
        items = torch.as_tensor(item).to(torch.int32)
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts:
            raise _outside(experts, num_experts)
        if position is None:
            first = torch.searchsorted(items, items) if len(items) else items
            position = torch.arange(len(items)) - first
        return cls(
            token_ids=torch.as_tensor(token_ids).to(torch.int32),
            kind=torch.as_tensor(kind).to(torch.uint8),
            item=items,
            position=torch.as_tensor(position).to(torch.int32),
            experts=experts.to(expert_dtype(num_experts)),
            weights=torch.zeros(*experts.shape[:2], 0).half() if weights is None else weights.to(torch.float16),
            num_experts=num_experts,
            tasks=tuple(tasks),
            meta=dict(meta or {}),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def items(self) -> int:
        return len(self.tasks)

    @property
    def layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    def rows(self, item: int) -> slice:
        """Where the tokens of ``item`` stand."""
        if not 0 <= item < self.items:
            raise ExpertFlowError(f"item {item} is not in this trace: use 0 to {self.items - 1}")
        ends = torch.searchsorted(self.item, torch.tensor([item, item + 1], dtype=torch.int32))
        return slice(int(ends[0]), int(ends[1]))

    def steps(self, item: int) -> list[slice]:
        """The tokens of ``item`` that run in one pass, pass by pass: the prompt if there is one, then each generated
        token."""
        rows = self.rows(item)
        prompt = rows.start + int((self.kind[rows] != GENERATED).sum())
        passes = [slice(rows.start, prompt)] if prompt > rows.start else []
        return passes + [slice(row, row + 1) for row in range(prompt, rows.stop)]

    def of_items(self, items: Sequence[int]) -> "RoutingTrace":
        """These items in this order, numbered anew."""
        parts = [self.rows(item) for item in items]
        places = [torch.arange(part.start, part.stop) for part in parts]
        counts = torch.tensor([part.stop - part.start for part in parts], dtype=torch.int64)
        numbers = torch.arange(len(parts), dtype=torch.int32).repeat_interleave(counts)
        return self._picked(torch.cat(places) if places else counts, numbers, tuple(self.tasks[item] for item in items))

    def of_task(self, task: str) -> "RoutingTrace":
        """The items of one task. Raises ExpertFlowError when there is none."""
        if task not in self.tasks:
            known = ", ".join(sorted(set(self.tasks)))
            raise ExpertFlowError(f"no item of this trace is of task {task!r}: use {known}")
        return self.of_items([item for item, name in enumerate(self.tasks) if name == task])

    def generated(self) -> "RoutingTrace":
        """The GENERATED tokens only; items keep their numbers, and tokens their positions."""
        kept = (self.kind == GENERATED).nonzero().flatten()
        return self._picked(kept, self.item[kept], self.tasks)

    def without_weights(self) -> "RoutingTrace":
        """The same routes without the gate's weights, for a smaller file."""
        return replace(self, weights=self.weights[:, :, :0])

    def paths(self) -> Tensor:
        """bool [N, L, E]: whether a token uses an expert."""
        paths = torch.zeros(*self.experts.shape[:2], self.num_experts, dtype=torch.bool)
        return paths.scatter_(2, self.experts.long(), True)

    def save(self, path: Path | str) -> None:
        """Write the file that ``load`` reads, under its name only once it is whole. Raises ExpertFlowError when it
        cannot be written."""
        counts = torch.bincount(self.item.long(), minlength=self.items)
        starts = (counts.cumsum(0) - counts).clamp(max=max(len(self) - 1, 0))
        first = torch.where(counts > 0, self.position[starts] if len(self) else counts, 0)
        tensors = {"token_ids": self.token_ids, "kind": self.kind, "experts": self.experts, "weights": self.weights}
        tensors |= {"item_tokens": counts.to(torch.int32), "item_first": first.to(torch.int32)}
        write_trace_file(Path(path), TraceContent(tensors, self.num_experts, list(self.tasks), self.meta))

    @classmethod
    def load(cls, path: Path | str) -> "RoutingTrace":
        """The trace in a file. Raises ExpertFlowError for one that is missing, damaged or no trace."""
        content = read_trace_file(Path(path))
        tensors = content.tensors
        counts, first = tensors["item_tokens"].long(), tensors["item_first"].long()
        position = torch.arange(int(counts.sum())) + (first - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        try:
            return cls(
                token_ids=tensors["token_ids"],
                kind=tensors["kind"],
                item=torch.arange(len(counts)).repeat_interleave(counts).to(torch.int32),
                position=position.to(torch.int32),
                experts=tensors["experts"],
                weights=tensors["weights"],
                num_experts=content.num_experts,
                tasks=tuple(content.tasks),
                meta=content.meta,
            )
        except ExpertFlowError as error:
            raise ExpertFlowError(f"{path}: {error}") from error

    @classmethod
    def load_of(cls, path: Path | str, experts: Sequence[int], top_k: int | None = None) -> "RoutingTrace":
        """The trace in a file, if it is of a model with these ``experts`` in each layer and, where it is given,
        ``top_k`` of them for a token. Raises ExpertFlowError otherwise, and as ``load``."""
        trace = cls.load(path)
        if [trace.num_experts] * trace.layers != list(experts) or top_k not in (None, trace.top_k):
            found, own = ("" if top_k is None else f", {count} for a token" for count in (trace.top_k, top_k))
            raise ExpertFlowError(
                f"{path} was recorded with {trace.layers} layers of {trace.num_experts} experts{found}, this model has "
                f"{list(experts)}{own}: record it with this model (`python -m calibration trace`)"
            )
        return trace

    def _picked(self, places: Tensor, item: Tensor, tasks: tuple[str, ...]) -> "RoutingTrace":
        return replace(
            self,
            token_ids=self.token_ids[places],
            kind=self.kind[places],
            item=item.to(torch.int32),
            position=self.position[places],
            experts=self.experts[places],
            weights=self.weights[places],
            tasks=tasks,
        )


def expert_dtype(num_experts: int) -> torch.dtype:
    """In which a trace keeps ids of experts."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def requests(trace: RoutingTrace, phase: Phase = "decode") -> Iterator[Step]:
    """The steps of items that run one at a time, in order: a prompt is one step that wants the union of its tokens'
    experts; each generated token is a step."""
    return grouped_requests(trace, [[item] for item in range(trace.items)], phase)


def batched_requests(trace: RoutingTrace, rows: int, phase: Phase = "decode") -> Iterator[Step]:
    """The same with ``rows`` items answered together, in order of their numbers; the last group may be smaller."""
    if rows < 1:
        raise ExpertFlowError(f"rows {rows} must be at least 1: that many items run together")
    groups = [range(first, min(first + rows, trace.items)) for first in range(0, trace.items, rows)]
    return grouped_requests(trace, groups, phase)


def grouped_requests(trace: RoutingTrace, groups: Sequence[Sequence[int]], phase: Phase = "decode") -> Iterator[Step]:
    """The steps of groups of items, group after group. The items of a group run together: their prompts are one step,
    then every step has the next generated token of each, until the last of them ends; a step wants the union."""
    if phase not in ("decode", "all"):
        raise ExpertFlowError(f"phase {phase!r} is not known: use decode or all")
    for group in groups:
        yield from _group_steps(trace, group, phase)


def _group_steps(trace: RoutingTrace, group: Sequence[int], phase: Phase) -> Iterator[Step]:
    prompts: list[Tensor] = []
    answers: list[Tensor] = []
    for item in group:
        rows = trace.rows(item)
        generated = trace.kind[rows] == GENERATED
        prompts.append(trace.experts[rows][~generated])
        answers.append(trace.experts[rows][generated])
    if phase == "all" and any(len(prompt) for prompt in prompts):
        yield _wanted(prompts, trace.layers)
    for step in range(max((len(answer) for answer in answers), default=0)):
        yield _wanted([answer[step : step + 1] for answer in answers], trace.layers)


def _wanted(parts: Sequence[Tensor], layers: int) -> Step:
    return [
        sorted({expert for part in parts for expert in part[:, layer].flatten().tolist()}) for layer in range(layers)
    ]


def _check_shapes(trace: RoutingTrace) -> None:
    if not 1 <= trace.num_experts <= 1 << 15:
        raise ExpertFlowError(f"num_experts {trace.num_experts} must lie between 1 and 32768")
    tokens = trace.token_ids.shape[:1].numel()
    flat = {"token_ids": torch.int32, "kind": torch.uint8, "item": torch.int32, "position": torch.int32}
    for name, dtype in flat.items():
        value: Tensor = getattr(trace, name)
        if value.dtype != dtype or value.shape != (tokens,):
            raise ExpertFlowError(f"{name} is {value.dtype} {tuple(value.shape)}, it must be {dtype} ({tokens},)")
    ids, dtype = trace.experts, expert_dtype(trace.num_experts)
    if ids.dtype != dtype or ids.ndim != 3 or ids.shape[0] != tokens or ids.shape[1] < 1 or ids.shape[2] < 1:
        raise ExpertFlowError(
            f"experts is {ids.dtype} {tuple(ids.shape)}, it must be {dtype} ({tokens}, layers, top_k) for "
            f"{trace.num_experts} experts"
        )
    weights = tuple(trace.weights.shape)
    if trace.weights.dtype != torch.float16 or weights not in (tuple(ids.shape), (*ids.shape[:2], 0)):
        raise ExpertFlowError(
            f"weights is {trace.weights.dtype} {weights}, it must be float16 {tuple(ids.shape)}, or none for a token"
        )


def _check_order(trace: RoutingTrace) -> None:
    if not len(trace):
        return
    if int(trace.kind.max()) > GENERATED:
        raise ExpertFlowError(
            f"kind {int(trace.kind.max())} is not known: use {PROMPT_TEXT}, {PROMPT_IMAGE} or {GENERATED}"
        )
    item, position = trace.item.long(), trace.position.long()
    rising = item.diff()
    if int(item[0]) < 0 or int(item[-1]) >= trace.items or bool((rising < 0).any()):
        raise ExpertFlowError(
            f"items must ascend from 0 to at most {trace.items - 1}, one task for each: found {int(item.min())} to "
            f"{int(item.max())} and {int((rising < 0).sum())} steps back"
        )
    same = rising == 0
    if int(position.min()) < 0 or bool((position.diff() != 1)[same].any()):
        raise ExpertFlowError(
            "positions must count up by one within an item, from 0 or later: keep the tokens in order"
        )
    if bool(((trace.kind[:-1] == GENERATED) & (trace.kind[1:] != GENERATED) & same).any()):
        raise ExpertFlowError("a prompt's token follows a generated one of the same item: make that a new item")


def _check_routes(trace: RoutingTrace) -> None:
    if not len(trace):
        return
    if int(trace.experts.min()) < 0 or int(trace.experts.max()) >= trace.num_experts:
        raise _outside(trace.experts, trace.num_experts)
    if bool((trace.experts.sort(-1).values.diff(dim=-1) == 0).any()):
        raise ExpertFlowError("experts names an expert twice for one token and layer: top-k ids must be distinct")
    if not bool(trace.weights.isfinite().all()):
        raise ExpertFlowError("weights has values that float16 does not hold: gate weights must be finite")


def _outside(experts: Tensor, num_experts: int) -> ExpertFlowError:
    return ExpertFlowError(
        f"experts {int(experts.min())} to {int(experts.max())} must lie between 0 and {num_experts - 1}: record again, "
        "or give the number of experts that the model has"
    )
