"""Recording routes while an engine answers: hooks on the experts modules see every token's experts and gate weights.

::

    with recording(engine, ["charts", "documents"]) as recorder:
        engine.generate([about_a_chart])
        engine.generate([about_a_document])
    recorder.trace().save("routes.safetensors")

Answers are the engine's own, computed one at a time on the plain path.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.seams import image_ids, is_experts, num_experts
from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, PROMPT_TEXT, RoutingTrace, expert_dtype
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.engine import Engine
from expertflow_quant.runtime.experts import attached
from expertflow_quant.runtime.plain import PlainRunner
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.stream import Cancellable, TokenQueue


@dataclass(frozen=True)
class RecordedItem:
    """One answered prompt: token_ids and kind [T], experts and weights [T, L, K], all on the CPU."""

    token_ids: Tensor
    kind: Tensor
    experts: Tensor
    weights: Tensor


class Recorder:
    """What was recorded so far. ``tasks``: the task of each item, in the order in which they will be asked;
    ``modules``: the experts modules, in model order."""

    def __init__(self, tasks: Sequence[str], modules: Sequence[Any]) -> None:
        self.tasks = tuple(tasks)
        self.items: list[RecordedItem] = []
        self.num_experts = max(num_experts(module) for module in modules)
        self._modules = modules

    def trace(self, meta: dict[str, str] | None = None) -> RoutingTrace:
        """The items so far as one trace. Raises ExpertFlowError when there are none."""
        if not self.items:
            raise ExpertFlowError("nothing was recorded: ask the engine for an answer inside the recording")
        counts = torch.tensor([len(item.token_ids) for item in self.items])
        return RoutingTrace.of(
            torch.cat([item.token_ids for item in self.items]),
            torch.cat([item.kind for item in self.items]),
            torch.arange(len(counts)).repeat_interleave(counts),
            torch.cat([item.experts for item in self.items]),
            self.num_experts,
            self.tasks[: len(self.items)],
            weights=torch.cat([item.weights for item in self.items]),
            meta=meta,
        )

    @contextmanager
    def listening(self) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
        """While the block runs, (experts [T, K], weights [T, K]) of every call of every module are noted."""
        calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._modules]
        hooks = [
            module.register_forward_pre_hook(_noting(calls[layer], expert_dtype(self.num_experts)), with_kwargs=True)
            for layer, module in enumerate(self._modules)
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


class RecordingRunner:
    """Answers as ``inner`` does, one prompt at a time, and tells ``recorder``."""

    max_rows: int | None = 1
    prefill_tokens: int | None = None

    def __init__(self, inner: PlainRunner, recorder: Recorder, images: Sequence[int]) -> None:
        self.inner, self.recorder, self._image_ids = inner, recorder, images
        self.room = inner.room

    @property
    def stats(self) -> CacheStats:
        return self.inner.stats

    def reset_stats(self) -> None:
        self.inner.reset_stats()

    @property
    def expert_bytes(self) -> int:
        return self.inner.expert_bytes

    @property
    def device_expert_bytes(self) -> int:
        return self.inner.device_expert_bytes

    def run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> list[list[int]]:
        """See ``runner.Runner``. Raises ExpertFlowError, before anything is computed, for several prompts at once, for
        a stream, and when every task has its item."""
        prompts = self._single(batches, streamer is not None or cancellable is not None)
        with self.recorder.listening() as calls:
            rows = self.inner.run(batches, sampling)
        self.recorder.items.append(_item(prompts, rows[0], calls, self._image_ids))
        return rows

    def _single(self, batches: Sequence[Prompts], streamed: bool) -> Prompts:
        count = sum(len(prompts) for prompts in batches)
        if count != 1 or not bool(batches[0].inputs["attention_mask"].all()):
            raise ExpertFlowError(
                f"{count} prompts at once cannot be recorded, for padding would count as tokens: ask for one at a time"
            )
        if streamed:
            raise ExpertFlowError("a stream cannot be recorded, for it may end anywhere: ask with engine.generate")
        if len(self.recorder.items) == len(self.recorder.tasks):
            raise ExpertFlowError(
                f"all {len(self.recorder.tasks)} tasks of this recording have their item: name a task for every prompt"
            )
        return batches[0]


@contextmanager
def recording(engine: Engine, tasks: Sequence[str]) -> Iterator[Recorder]:
    """While the block runs, every answer of ``engine.generate`` is recorded, several conversations one after the other.

    ``tasks`` names the task of each conversation, in the order in which they will be asked. An answer that fails is
    not recorded. Raises ExpertFlowError for an engine on the fast path, whose captured steps show no routes, and for a
    model without experts.
    """
    runner = engine.runner
    if not isinstance(runner, PlainRunner):
        raise ExpertFlowError(
            f"{type(runner).__name__} runs captured steps and streamed layers, which show no routes, or records "
            "already: load the model with fast=False, and record once at a time"
        )
    modules = attached(engine.model) or [module for module in engine.model.modules() if is_experts(module)]
    if not modules:
        raise ExpertFlowError(
            f"{type(engine.model).__name__} has no experts module, so there are no routes: give a Mixture-of-Experts "
            "model"
        )
    recorder = Recorder(tasks, modules)
    engine.runner = RecordingRunner(runner, recorder, image_ids(engine.model.config))
    try:
        yield recorder
    finally:
        engine.runner = runner


def _noting(calls: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Any:
    def note(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        index, weights = (
            args[place] if len(args) > place else named[name]
            for place, name in ((1, "top_k_index"), (2, "top_k_weights"))
        )
        if index.ndim != 2 or index.shape != weights.shape:
            raise ExpertFlowError(
                f"{type(module).__name__} is given experts {tuple(index.shape)} and weights {tuple(weights.shape)}, "
                "where [tokens, top_k] of both is recorded: this model cannot be recorded"
            )
        if bool((index >= num_experts(module)).any()):
            raise ExpertFlowError(
                f"a token of {type(module).__name__} is routed to expert {int(index.max())} of {num_experts(module)}, "
                "which is elsewhere: record on one device"
            )
        calls.append((index.detach().to("cpu", dtype), weights.detach().to("cpu", torch.float16)))

    return note


def _item(
    prompts: Prompts, answer: Sequence[int], calls: Sequence[Sequence[tuple[Tensor, Tensor]]], images: Sequence[int]
) -> RecordedItem:
    """The answer's last token was not fed back, so it has no routes."""
    prompt = prompts.inputs["input_ids"][0].cpu()
    fed = torch.tensor(answer[:-1], dtype=prompt.dtype)
    is_image = torch.isin(prompt, torch.tensor(images, dtype=prompt.dtype))
    kind = torch.cat([torch.where(is_image, PROMPT_IMAGE, PROMPT_TEXT), torch.full_like(fed, GENERATED)])
    tokens = [sum(len(index) for index, _ in layer) for layer in calls]
    widths = {index.shape[1] for layer in calls for index, _ in layer}
    if tokens != [len(kind)] * len(calls) or len(widths) != 1:
        raise ExpertFlowError(
            f"the experts modules saw {tokens} tokens with {sorted(widths)} experts each, where {len(kind)} ran "
            "through every layer: a model that skips tokens or layers cannot be recorded"
        )
    experts, weights = (
        torch.stack([torch.cat([call[which] for call in layer]) for layer in calls], dim=1) for which in (0, 1)
    )
    return RecordedItem(torch.cat([prompt, fed]), kind, experts, weights)
