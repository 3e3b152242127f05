"""A model's forward run from one block to another, for one batch at a time.

The blocks that hold the experts stand in one module list and hand on what they make, block by block. So to go on
behind a block, its output is read from disk, the model's own forward is run again, the blocks before that one do
nothing, and that one answers with what was read. What lies between blocks (embeddings, masks, positions, image
features added to the stream) is the model's own code and costs little; what towers give (modules with blocks of their
own) is read from disk too.

Blocks may share a dict of tensors (Gemma 4's blocks leave keys and values in one): what it held behind a block is kept
with that block's output. A model of which all this is not true is found out and raises NotReplayable: its blocks share
something else that they may write to, or what comes out of a skipped block, which is NaN, reaches a block that runs.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from expertflow_quant.pipeline.activations import Activations, Stored, structure_of, value_of
from expertflow_quant.pipeline.batches import Batch
from expertflow_quant.pipeline.forwards import ExpertsCall, current_observer, observed_by
from expertflow_quant.pipeline.observed import Gathered, ObservedLayer, Tokens
from expertflow_quant.pipeline.parallel import side_by_side
from expertflow_quant.pipeline.stream import ModelStream, MoELayer

Answer = Callable[[MoELayer, Sequence[ExpertsCall]], Sequence[Tensor]]


class NotReplayable(Exception):
    """A model's blocks cannot be run apart; says why."""


class _Reached(BaseException):
    """Ends a forward that has come as far as it should; no handler of a model may swallow it."""


@dataclass(frozen=True)
class Chain:
    """The blocks that hold the experts, the number of the block of every MoE layer, and the towers beside them."""

    blocks: list[nn.Module]
    block_of: list[int]
    towers: list[nn.Module]


@dataclass
class _Pass:
    """One batch's way through blocks ``start`` to ``stop``, or to the experts ``end``."""

    batch: int
    start: int
    stop: int
    end: nn.Module | None
    replay: "Replay"
    before: Any = None
    skipped: Any = None
    output: Any = None
    scores: Tensor | None = None
    calls: list[tuple[MoELayer, ExpertsCall]] = field(default_factory=list)
    tower_calls: int = 0

    def answer(self, call: ExpertsCall) -> Tensor:
        layer = self.replay.layer_of[call.module]
        self.calls.append((layer, call))
        if call.module is self.end:
            raise _Reached
        return self.replay.answer(layer, [call])[0]


class Replay:
    """Brings all batches from MoE layer to MoE layer. ``answer`` says what a layer's experts answer to some calls."""

    def __init__(
        self,
        model: Any,
        chain: Chain,
        stream: ModelStream,
        batches: Sequence[Callable[[], Batch]],
        store: Activations,
        answer: Answer,
        gathered: Callable[[MoELayer], Gathered],
    ) -> None:
        self._model, self._chain, self._stream, self._store = model, chain, stream, store
        self._make, self.answer, self._gathered = batches, answer, gathered
        self.layer_of = {model.get_submodule(layer.module): layer for layer in stream.layers}
        self._inputs: dict[int, tuple[Stored, list[str]]] = {}
        self._tokens: dict[int, Tokens] = {}
        self._towers: dict[tuple[int, int], tuple[Stored, list[Any], Any]] = {}
        self._device = next(model.parameters()).device
        self._wrapped = [(module, module.forward) for module in [*chain.blocks, *chain.towers]]
        for number, block in enumerate(chain.blocks):
            block.forward = partial(self._run_block, number, block.forward)
        for tower in chain.towers:
            tower.forward = partial(self._run_tower, tower.forward)

    def layers(self, first: int) -> Iterator[ObservedLayer]:
        """What every MoE layer from ``first`` on shows; a layer's predecessors must be done with when it is asked
        for."""
        block_of = self._chain.block_of
        done, outputs = self._store.resume(block_of[first], len(self._make)) or (-1, [])
        for block in [block for block in sorted(set(block_of)) if block > done]:
            here = [layer for layer in self._stream.layers if block_of[layer.index] == block]
            last = block == block_of[-1]
            self._stream.hold([layer.index for layer in here], self._device)
            seen = {layer.index: self._gathered(layer) for layer in here if layer.index >= first}
            made = self._bring(done + 1, block, here[-1] if last else None, outputs, seen)
            if not last:
                self._store.commit(block, made)
            yield from (each.layer_observed() for each in seen.values())
            if outputs:
                self._store.drop(done, outputs)
            done, outputs = block, made

    def close(self) -> None:
        """The model is as it was."""
        self._stream.hold([])
        for module, forward in self._wrapped:
            module.forward = forward

    def _bring(
        self, start: int, stop: int, last: MoELayer | None, before: Sequence[Stored], seen: dict[int, Gathered]
    ) -> list[Stored]:
        """All batches through blocks ``start`` to ``stop``; adds what they show, returns what comes out, by batch."""
        end = None if last is None else self._model.get_submodule(last.module)
        passes = [_Pass(batch, start, stop, end, self) for batch in range(len(self._make))]
        made = []
        ran = side_by_side(
            iter(passes), lambda run: self._run(run, before[run.batch] if before else None), self._on_threads
        )
        for run, stored in ran:
            for layer, call in run.calls:
                if layer.index in seen:
                    seen[layer.index].add(call, self._tokens[run.batch], run.batch)
            run.calls.clear()
            if stored is not None:
                made.append(stored)
        return made

    def _on_threads(self, run: _Pass) -> bool:
        return self._device.type == "cpu"

    def _run(self, run: _Pass, before: Stored | None) -> tuple[_Pass, Stored | None]:
        if before is not None:
            loaded = [tensor.to(self._device) for tensor in self._store.load(before)]
            run.before = value_of(before.structure, loaded)
            run.skipped, _ = value_of(before.structure, [_poison(tensor) for tensor in loaded])
        try:
            with observed_by(run), torch.no_grad():
                self._model(**self._batch(run.batch), use_cache=False)
        except _Reached:
            pass
        stored = None if run.end is not None else self._save(f"block-{run.stop:05d}-batch-{run.batch:05d}", run.output)
        run.before = run.skipped = run.output = None
        return run, stored

    def _save(self, name: str, output: Any) -> Stored:
        tensors: list[Tensor] = []
        try:
            structure = structure_of(output, tensors)
        except TypeError as error:
            raise NotReplayable(f"a block hands on {error}") from error
        return self._store.save(name, tensors, structure)

    def _batch(self, number: int) -> Batch:
        """A batch as it was made for the first block that was run, so that images are read once."""
        if number not in self._inputs:
            batch = self._make[number]()
            self._tokens[number] = Tokens.of(batch, self._stream.config)
            stored = self._store.save(f"batch-{number:05d}", list(batch.values()), sync=False)
            self._inputs[number] = stored, list(batch)
            return batch
        stored, names = self._inputs[number]
        tensors = [tensor.to(self._device) for tensor in self._store.load(stored)]
        return dict(zip(names, tensors, strict=True))

    def _run_block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = _current()
        if number < run.start - 1:
            return run.skipped
        shared = [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
        if number == run.start - 1:
            output, held = run.before
            _refill(shared, held)
            return output
        _refuse_shared(args, kwargs)
        given = args, list(kwargs.values()), _items(shared)
        if number == run.start > 1 and _has_nan(given) and not _has_nan(run.before):
            raise NotReplayable("what a block makes goes to other blocks than the next one")
        output = forward(*args, **kwargs)
        _refuse_shared(args, kwargs)
        if number == run.stop:
            run.output = output, _items(shared)
            raise _Reached
        return output

    def _run_tower(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = _current()
        key = run.batch, run.tower_calls
        run.tower_calls += 1
        if key not in self._towers:
            leaves, spec = pytree.tree_flatten(forward(*args, **kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
            stored = self._store.save(f"tower-{key[1]:05d}-batch-{key[0]:05d}", tensors, is_tensor, sync=False)
            self._towers[key] = stored, rest, spec
        stored, rest, spec = self._towers[key]
        loaded = iter(self._store.load(stored))
        parts = [
            next(loaded).to(self._device) if is_tensor else other
            for is_tensor, other in zip(stored.structure, rest, strict=True)
        ]
        return pytree.tree_unflatten(parts, spec)


def find_chain(model: nn.Module, layers: Sequence[MoELayer]) -> Chain | None:
    """The blocks of a model and its towers; None where its experts do not stand, in order, in one module list."""
    places = [_block_place(model, layer.module) for layer in layers]
    names = {name for name, _ in places}
    numbers = [number for _, number in places]
    if len(names) != 1 or (name := names.pop()) is None or numbers != sorted(numbers):
        return None
    blocks = model.get_submodule(name)
    return Chain(list(blocks.children()), numbers, list(_towers(model, blocks)))


def _block_place(model: nn.Module, name: str) -> tuple[str | None, int]:
    """The outermost module list around a module, and the number in it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[:end]), int(parts[end])
    return None, 0


def _towers(module: nn.Module, blocks: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        inside = list(child.modules())
        if any(each is blocks for each in inside):
            yield from _towers(child, blocks)
        elif any(isinstance(each, nn.ModuleList) for each in inside) and not isinstance(child, nn.ModuleList):
            yield child


def _current() -> _Pass:
    observer = current_observer()
    if not isinstance(observer, _Pass):
        raise NotReplayable("a block runs on a thread of its own")
    return observer


def _poison(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.zeros_like(tensor)


def _has_nan(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return any(bool(tensor.max().isnan()) for tensor in tensors if tensor.is_floating_point() and tensor.numel())


def _items(mappings: Sequence[Mapping[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    return [list(mapping.items()) for mapping in mappings]


def _refill(mappings: Sequence[MutableMapping[Any, Any]], held: Sequence[list[tuple[Any, Any]]]) -> None:
    """Mappings hold what they held behind the block that is skipped."""
    if len(mappings) != len(held):
        raise NotReplayable(f"a block was given {len(held)} dicts to share, and now {len(mappings)}")
    for mapping, items in zip(mappings, held, strict=True):
        mapping.clear()
        mapping.update(items)


def _refuse_shared(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Blocks that are given something to write to may tell each other what is not in their outputs; only what a dict
    of tensors holds can be kept and given back."""
    given = [(f"argument {place}", value) for place, value in enumerate(args)] + list(kwargs.items())
    for name, value in given:
        if not _is_plain(tuple(value.items()) if isinstance(value, Mapping) else value):
            raise NotReplayable(f"blocks are given a {type(value).__name__} ({name}) that they may write to")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(each) for each in value)
    plain = (Tensor, bool, int, float, str, torch.dtype, torch.device, torch.Size)
    return value is None or isinstance(value, plain)
