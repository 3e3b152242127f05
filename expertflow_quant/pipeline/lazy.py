"""Weights that are in memory only while a forward is in the block that they belong to.

A model's blocks (what its outermost module lists hold: decoder layers, the layers of a vision tower) and its
output embeddings are read when the first forward enters them and let go when the last one leaves; of the
input embeddings the rows that a batch asks for are read. What lies elsewhere (norms, mergers) is small and
is loaded with the model.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation

from expertflow_quant.models.seams import is_experts
from expertflow_quant.pipeline.stream import ModelStream


@dataclass(frozen=True)
class Weight:
    """A parameter that is read when it is needed: where it belongs, and the name under which it is stored."""

    module: nn.Module
    name: str
    source: str
    dtype: torch.dtype

    def put(self, tensor: Tensor, device: torch.device) -> None:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        self.module._parameters[self.name] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)

    def drop(self) -> None:
        self.module._parameters.pop(self.name, None)


@dataclass
class Unit:
    """A module whose weights come and go together; ``users``: forwards that are in it now."""

    module: nn.Module
    weights: list[Weight]
    users: int = 0


@dataclass
class LazyWeights:
    """The units of a model on ``device``, and its input embeddings."""

    stream: ModelStream
    device: torch.device
    units: list[Unit]
    embedding: Weight | None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def names(self) -> list[str]:
        """The parameters that are not loaded with the model, as the model names them."""
        return [weight.source for weight in self._weights]

    def detach(self) -> None:
        """Takes the (meta) parameters out of the model, and leaves transformers nothing to initialise there."""
        for weight in self._weights:
            weight.drop()
            weight.module._is_hf_initialized = True  # type: ignore[assignment]
        for unit in self.units:
            for module in unit.module.modules():  # a module may initialise the weights of its children
                if not module._non_persistent_buffers_set:
                    module._is_hf_initialized = True  # type: ignore[assignment]

    def attach(self) -> None:
        """From now on forwards read what they need."""
        for unit in self.units:
            _wrap(unit.module, self._forward(unit, unit.module.forward))
        if self.embedding is not None:
            _wrap(self.embedding.module, self._rows(self.embedding, self.embedding.module.forward))

    @contextlib.contextmanager
    def held(self, unit: Unit) -> Iterator[None]:
        """The unit's weights are there for as long as this lasts."""
        with self._lock:
            if unit.users == 0:
                for weight in unit.weights:
                    weight.put(self.stream.finite_parameter(weight.source), self.device)
            unit.users += 1
        try:
            yield
        finally:
            with self._lock:
                unit.users -= 1
                if unit.users == 0:
                    for weight in unit.weights:
                        weight.drop()

    def _forward(self, unit: Unit, forward: Any) -> Any:
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            with self.held(unit):
                return forward(*args, **kwargs)

        return with_weights

    def _rows(self, weight: Weight, forward: Any) -> Any:
        def with_rows(ids: Tensor) -> Any:
            wanted, places = torch.unique(ids, return_inverse=True)
            rows = self.stream.rows(weight.source, wanted.tolist())
            with self._lock:
                weight.put(rows, self.device)
                try:
                    return forward(places)
                finally:
                    weight.drop()

        return with_rows

    @property
    def _weights(self) -> list[Weight]:
        embedding = [] if self.embedding is None else [self.embedding]
        return [weight for unit in self.units for weight in unit.weights] + embedding


def lazy_weights(model: Any, stream: ModelStream, device: torch.device, dtype: torch.dtype) -> LazyWeights:
    """What of a model (on meta) can be read later, in the dtype that transformers would give it."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    kept = model._get_dtype_plan(dtype)
    pattern, groups, _ = build_glob_alternation(list(kept)) if kept else (None, {}, {})

    def weight(module: nn.Module, own: str, name: str) -> Weight | None:
        source = name if stream.has(name) else tied.get(name, name)
        found = None if pattern is None else pattern.search(name)
        as_dtype = dtype if found is None else kept[groups[str(found.lastgroup)]]
        return Weight(module, own, source, as_dtype) if stream.has(source) else None

    def weights(name: str, unit: nn.Module) -> list[Weight]:
        inside = [(inner, module) for inner, module in unit.named_modules(prefix=name) if _may_wait(module)]
        found = [weight(module, own, f"{inner}.{own}") for inner, module in inside for own in module._parameters]
        return [each for each in found if each is not None and each.module._parameters[each.name] is not None]

    named = dict(model.named_modules())
    units = [Unit(module, weights(name, module)) for name, module in _blocks(model)]
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    units += [Unit(module, weights(name, module)) for name, module in named.items() if module is output]
    place = next((name for name, module in named.items() if module is embedding), None)
    is_table = isinstance(embedding, nn.Embedding) and embedding.max_norm is None and _may_wait(embedding)
    table = weight(embedding, "weight", f"{place}.weight") if place is not None and is_table else None
    return LazyWeights(stream, device, [unit for unit in units if unit.weights], table)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what the outermost module lists hold."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{name}.{index}", block) for index, block in enumerate(child))
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _may_wait(module: nn.Module) -> bool:
    """Experts are read one by one; a module that makes buffers of its own is left to transformers."""
    return not is_experts(module) and not module._non_persistent_buffers_set


def _wrap(module: nn.Module, forward: Any) -> None:
    module.forward = forward
