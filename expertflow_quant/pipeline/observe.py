"""Runs a model over calibration data, layer by layer, and hands on what each MoE layer shows (``observed``).

The model runs in full precision. Usually every batch goes from one MoE layer to the next at a time and its
activations lie on disk in between (``replay``); where a model's blocks cannot be run apart, the batches' forwards
wait for each other in memory (``forwards``).
"""

import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import ExpertWeights, expert_product
from expertflow_quant.models.seams import find_router
from expertflow_quant.pipeline.activations import Activations
from expertflow_quant.pipeline.backbone import load_backbone
from expertflow_quant.pipeline.batches import Batch, CalibrationData
from expertflow_quant.pipeline.forwards import ExpertsCall, Forward, Forwards, watch_router
from expertflow_quant.pipeline.observed import (
    ExpertRows,
    Gathered,
    ObservedLayer,
    ObserveOptions,
    Tokens,
    expert_places,
)
from expertflow_quant.pipeline.replay import NotReplayable, Replay, find_chain
from expertflow_quant.pipeline.stream import ModelStream, MoELayer

__all__ = ["ExpertRows", "Observations", "ObserveOptions", "ObservedLayer", "answers", "in_dtype"]


class Observations:
    """The activations that ``data`` gives at every MoE layer of a model, computed layer by layer as they are
    asked for.

    With ``keep`` they stay in memory after the first complete pass, for quantizing the same model by several
    methods.
    """

    def __init__(
        self,
        stream: ModelStream,
        data: CalibrationData,
        options: ObserveOptions | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        keep: bool = False,
    ) -> None:
        self.stream, self.data, self.options = stream, data, options or ObserveOptions()
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.keep = keep
        self._kept: list[ObservedLayer] = []

    def about(self) -> dict[str, object]:
        """What decides the activations, as JSON."""
        return {
            "digest": self.data.digest,
            **self.data.about,
            "min_tokens": self.options.min_tokens,
            "text_share": self.options.text_share,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def layers(self, first: int = 0, folder: Path | None = None) -> Iterator[ObservedLayer]:
        """Every MoE layer in order, from layer ``first`` on. In ``folder`` activations lie while this goes on (else in
        one for temporary files); those of an earlier pass that was stopped are used there, if nothing that decides
        them (``about``) has changed. Raises ExpertFlowError when the model runs its layers in another order."""
        if self._kept:
            yield from self._kept[first:]
            return
        seen = []
        with ExitStack() as stack:
            temporary = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertflow-")))
            store = Activations(temporary, durable=folder is not None)
            for observed in stack.enter_context(closing(_observe(self, first, store))):
                if self.keep:
                    seen.append(observed)
                if len(seen) == len(self.stream.layers):
                    self._kept = seen
                yield observed


def _observe(wanted: Observations, first: int, store: Activations) -> Generator[ObservedLayer]:
    stream = wanted.stream
    model = load_backbone(stream, wanted.device, wanted.dtype)
    routers = [(find_router(model, layer.module), layer.experts) for layer in stream.layers]
    hooks = [watch_router(router, experts) for router, experts in routers if router is not None]
    batches = [partial(_on_device, make, wanted.device) for make in wanted.data.batches]
    gathered = partial(Gathered, options=wanted.options, on_disk=None if wanted.keep else store)
    try:
        if (chain := find_chain(model, stream.layers)) is not None:
            replay = Replay(model, chain, stream, batches, store, partial(answers, stream), gathered)
            try:
                for observed in replay.layers(first):
                    yield observed
                    first = observed.layer.index + 1
                return
            except NotReplayable as why:
                warnings.warn(f"all calibration activations are held in memory: {why}", stacklevel=2)
            finally:
                replay.close()
        for observed in _meet(model, stream, Forwards(model, batches, wanted.device), gathered):
            if observed.layer.index >= first:
                yield observed
    finally:
        for hook in hooks:
            hook.remove()


def _meet(
    model: Any, stream: ModelStream, forwards: Forwards, gathered: Callable[[MoELayer], Gathered]
) -> Iterator[ObservedLayer]:
    """All batches wait at every layer until all have come there."""
    modules = [model.get_submodule(layer.module) for layer in stream.layers]
    try:
        forwards.resume(dict.fromkeys(forwards.all))
        tokens = {forward: Tokens.of(forward.batch, stream.config) for forward in forwards.all}
        for layer, module in zip(stream.layers, modules, strict=True):
            here = [forward for forward in forwards.all if _at(forward) is module]
            seen = gathered(layer)
            for forward in here:
                if forward.call is not None:
                    seen.add(forward.call, tokens[forward], forwards.all.index(forward))
            yield seen.layer_observed()
            if module is not modules[-1]:
                calls = [forward.call for forward in here if forward.call is not None]
                forwards.resume(dict(zip(here, answers(stream, layer, calls), strict=True)))
                _refuse_going_back(forwards.all, modules[: layer.index + 1], layer)
    finally:
        forwards.close()


def _on_device(make_batch: Callable[[], Batch], device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in make_batch().items()}


def _at(forward: Forward) -> nn.Module | None:
    return None if forward.call is None else forward.call.module


def _refuse_going_back(forwards: Sequence[Forward], done: Sequence[nn.Module], layer: MoELayer) -> None:
    if any(_at(forward) is module for forward in forwards for module in done):
        raise ExpertFlowError(
            f"after {layer.module} the model runs an MoE layer that comes before it, so its layers cannot be "
            "calibrated one after the other: use --method rtn, which needs no calibration"
        )


def answers(stream: ModelStream, layer: MoELayer, calls: Sequence[ExpertsCall]) -> Sequence[Tensor]:
    """What the layer's experts answer in full precision, ``[T, H]`` of each call; each expert is read once, and
    products are summed in expert order in float32."""
    if not calls:
        return []
    hidden = torch.cat([call.hidden for call in calls])
    index = torch.cat([call.top_k_index for call in calls])
    affinity = torch.cat([call.top_k_weights for call in calls]).reshape(-1).float()
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    places = expert_places(index, layer.experts)
    with torch.no_grad():
        for expert in range(layer.experts):
            if len(at := places[expert]):
                tokens = at // index.shape[1]
                weights = in_dtype(stream.expert(layer.index, expert), hidden)
                product = expert_product(hidden[tokens], weights, stream.gate(layer.index))
                total.index_add_(0, tokens, product.float() * affinity[at, None])
    return torch.split(total.to(hidden.dtype), [len(call.hidden) for call in calls])


def in_dtype(weights: ExpertWeights, like: Tensor) -> ExpertWeights:
    """An expert's weights in the dtype and on the device of ``like``."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(like)

    return ExpertWeights(
        weights.gate_up.to(like),
        weights.down.to(like),
        gate_up_bias=moved(weights.gate_up_bias),
        down_bias=moved(weights.down_bias),
    )
