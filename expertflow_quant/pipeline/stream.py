"""Reads a model's weights one expert at a time, whatever layout its files have, without building the model.

Which tensors of the files make up a parameter, and how (stacked, joined, transposed), is taken from
transformers' own conversion registry, applied to a model on the meta device; nothing here knows an
architecture. For one expert the registry's operations run on that expert's tensors alone; where they mix
experts (ERNIE-VL) a layer is converted whole and kept until the next one.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.tensors import PendingTensor
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape
from expertflow_quant.kernels import ExpertWeights
from expertflow_quant.models.seams import (
    expert_modules,
    expert_parameters,
    expert_shape,
    model_class,
    num_experts,
    read_config,
    top_k,
)
from expertflow_quant.pipeline.shards import Shards


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: its number, the experts module's name, sizes, count, and experts per
    token."""

    index: int
    module: str
    shape: ExpertShape
    experts: int
    top_k: int


@dataclass
class _Recipe:
    """How parameters are made from tensors of the files: by ``converter`` (None: as it is) from
    ``sources``."""

    targets: list[str]
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]


class ModelStream:
    """A transformers model folder, read tensor by tensor.

    Raises ExpertFlowError for a model without experts or already quantized, CheckpointError for missing
    tensors.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ExpertFlowError(f"{self.folder} is quantized already: give the model in its own full precision")
        self.shards = Shards(self.folder)
        with torch.device("meta"):
            self.model: nn.Module = model_class(self.config)(self.config)
        self.layers = _layers(self.model)
        self._meta = self.model.state_dict()
        self._recipes = _recipes(self.model, self._meta, self.shards.keys)
        self._recipe_of = {target: recipe for recipe in self._recipes for target in recipe.targets}
        self._kept: tuple[_Recipe, dict[str, Tensor]] | None = None
        self._held: dict[int, list[ExpertWeights]] = {}
        self._check_complete()

    def gate(self, layer: int) -> Callable[[Tensor], Tensor]:
        """What a layer's experts do between their two products: the gate, or the activation where there is
        none."""
        module = self.experts_module(layer)
        gate: Any = module._apply_gate if module.has_gate else module.act_fn
        return gate

    def experts_module(self, layer: int) -> nn.Module:
        """The (weightless, meta) experts module of a layer."""
        return self.model.get_submodule(self.layers[layer].module)

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's weights as they are stored: gate_up ``[2I or I, H]``, down ``[H, I]``, biases, on
        the CPU, or where ``hold`` put them. Raises CheckpointError naming the tensor for a NaN or an infinity."""
        if layer in self._held:
            return self._held[layer][expert]
        module = self.experts_module(layer)
        tensors = {}
        for name, parameter in expert_parameters(module).items():
            tensor = self._expert_parameter(f"{self.layers[layer].module}.{parameter}", expert)
            tensors[name] = tensor.T.contiguous() if module.is_transposed and tensor.ndim == 2 else tensor
            if not is_finite(tensor):
                self._refuse_nan(
                    f"{self.layers[layer].module}.{parameter}", f" (layer {layer}, expert {expert})", expert
                )
        return ExpertWeights(**tensors)

    def hold(self, layers: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Keeps the experts of these layers in memory, in the dtype in which they are stored, and no others'."""
        self._held = {layer: held for layer, held in self._held.items() if layer in layers}
        for layer in layers:
            if layer not in self._held:
                experts = [self.expert(layer, expert) for expert in range(self.layers[layer].experts)]
                self._held[layer] = [_on(device, weights) for weights in experts]

    def has(self, name: str) -> bool:
        """Whether the files hold a parameter of this name, or what it is made from."""
        return name in self._recipe_of

    def finite_parameter(self, name: str) -> Tensor:
        """``parameter``, or CheckpointError naming the tensor that holds a NaN or an infinity."""
        tensor = self.parameter(name)
        if not is_finite(tensor):
            self._refuse_nan(name)
        return tensor

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a parameter, ``[len(rows), ...]``, as ``parameter`` gives it; only they are read where
        the file allows it."""
        recipe = self._recipe_of[name]
        if recipe.converter is None:
            return self.shards.read_rows(recipe.keys[0], rows)
        return self.parameter(name)[list(rows)]

    def parameter(self, name: str) -> Tensor:
        """One whole parameter of the model, on the CPU in the dtype in which it is stored."""
        recipe = self._recipe_of[name]
        if recipe.converter is None:
            return self.shards.read(recipe.keys[0])
        if self._kept is None or self._kept[0] is not recipe:
            self._kept = (recipe, self._convert(recipe, self.model, None))
        return self._kept[1][name]

    def backbone(self) -> list[PendingTensor]:
        """Every weight that is not an expert's, to be written under the model's own parameter names.

        A parameter whose own name transformers would rename or convert when it reads it back keeps the names
        and the tensors of the source files instead, so that loading gives the same parameters either way.
        """
        experts = self._expert_names()
        stable = self._stable_names()
        pending: list[PendingTensor] = []
        for recipe in self._recipes:
            if experts.isdisjoint(recipe.targets):
                pending += self._as_parameters(recipe) if stable.issuperset(recipe.targets) else self._as_stored(recipe)
        return pending

    def close(self) -> None:
        """Lets go of the files and of what was kept."""
        self._kept = None
        self._held = {}
        self.shards.close()

    def _refuse_nan(self, name: str, where: str = "", expert: int | None = None) -> None:
        """Names the tensors of the files that a parameter is made from."""
        recipe = self._recipe_of[name]
        listed = expert is not None and _is_listed(recipe.converter)
        keys = [keys[expert] if listed else keys[0] for keys in recipe.sources.values()]  # type: ignore[index]
        bad = next((key for key in keys if not is_finite(self.shards.read(key, None if listed else expert))), keys[0])
        raise CheckpointError(nan_found(f"{bad}{where}", self.shards.file(bad)))

    def _expert_names(self) -> set[str]:
        return {
            f"{layer.module}.{parameter}"
            for layer in self.layers
            for parameter in expert_parameters(self.experts_module(layer.index)).values()
        }

    def _expert_parameter(self, name: str, expert: int) -> Tensor:
        recipe = self._recipe_of[name]
        if recipe.converter is None:
            return self.shards.read(recipe.keys[0], expert)[0]
        if _works_per_expert(recipe.converter):
            return self._convert(recipe, _OneExpert(self.model), expert)[name][0]
        return self.parameter(name)[expert]

    def _convert(self, recipe: _Recipe, model: Any, expert: int | None) -> dict[str, Tensor]:
        """Runs the registry's operations: on everything, or on one expert's tensors (result: a stack of
        one)."""
        converter = copy.deepcopy(recipe.converter)
        listed = isinstance(converter.operations[0], MergeModulelist)
        for pattern, keys in recipe.sources.items():
            for key in keys if expert is None or not listed else [keys[expert]]:
                index = None if listed else expert
                converter.add_tensor(recipe.targets[0], key, pattern, partial(self.shards.read, key, index))
        made = converter.convert(recipe.targets[0], model=model, config=self.config)
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        if set(tensors) != set(recipe.targets):
            raise ExpertFlowError(
                f"transformers converts {recipe.keys[0]} to {sorted(tensors)}, expected {recipe.targets}: "
                f"this build does not know that conversion: save the model once with save_pretrained and "
                f"quantize the copy"
            )
        return tensors

    def _as_parameters(self, recipe: _Recipe) -> list[PendingTensor]:
        dtype = self.shards.dtype(recipe.keys[0])
        return [
            PendingTensor(name, dtype, tuple(self._meta[name].shape), partial(self.finite_parameter, name))
            for name in recipe.targets
        ]

    def _finite_stored(self, key: str) -> Tensor:
        tensor = self.shards.read(key)
        if not is_finite(tensor):
            raise CheckpointError(nan_found(key, self.shards.file(key)))
        return tensor

    def _as_stored(self, recipe: _Recipe) -> list[PendingTensor]:
        return [
            PendingTensor(key, self.shards.dtype(key), self.shards.shape(key), partial(self._finite_stored, key))
            for key in recipe.keys
        ]

    def _stable_names(self) -> set[str]:
        """The parameters that loading finds again under their own names, untouched by any conversion."""
        recipes = _recipes(self.model, self._meta, list(self._meta))
        return {recipe.targets[0] for recipe in recipes if not recipe.converter and recipe.keys == recipe.targets}

    def _check_complete(self) -> None:
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in self._meta if name not in self._recipe_of and name not in tied]
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
        for name in sorted(self._expert_names().difference(missing)):
            recipe, experts = self._recipe_of[name], self._meta[name].shape[0]
            if _is_listed(recipe.converter) and any(len(keys) != experts for keys in recipe.sources.values()):
                missing.append(f"some of the {experts} experts of {name}")
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of the model's parameters ({', '.join(missing[:3])}), "
                f"and transformers would fill them with random numbers: download the missing shards or "
                f"correct config.json"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.dtype.itemsize < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()  # NaN if there is one; a thirtieth of the time of asking each number
    return bool(low.isfinite() & high.isfinite())


def nan_found(what: str, path: Path) -> str:
    """The message for weights that are no numbers."""
    return (
        f"{what} in {path} holds NaN or infinity, from which nothing can be quantized: download the file again; "
        f"what is finished stays, and the same command goes on from there"
    )


def _on(device: torch.device | str, weights: ExpertWeights) -> ExpertWeights:
    parts = {part.name: getattr(weights, part.name) for part in fields(weights)}
    moved: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in parts.items()}
    return ExpertWeights(**moved)


class _OneExpert:
    """Stands in for the model where an operation asks for a parameter's shape: the shape of a stack of one
    expert."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        shape = self._model.get_parameter(name).shape
        return torch.empty(1, *shape[1:], device="meta")


def _layers(model: nn.Module) -> list[MoELayer]:
    return [
        MoELayer(index, name, expert_shape(module), num_experts(module), top_k(model, name))
        for index, (name, module) in enumerate(expert_modules(model))
    ]


def _recipes(model: Any, meta: dict[str, Tensor], keys: Sequence[str]) -> list[_Recipe]:
    """Every parameter's recipe, as transformers' own loader pairs the files' keys with the model's
    parameters."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    recipes: dict[str, _Recipe] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if target not in meta and key in meta:
            target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=meta)
        if target in meta:
            converter = by_pattern[pattern] if pattern is not None else None
            recipe = recipes.setdefault(target, _Recipe(_targets(target, converter, meta), converter))
            recipe.sources.setdefault(pattern or key, []).append(key)
    return list(recipes.values())


def _targets(first: str, converter: Any, meta: dict[str, Tensor]) -> list[str]:
    """All parameters that a converter makes when ``first`` is the first of them."""
    patterns = converter.target_patterns if converter is not None else [first]
    names = [first.replace(patterns[0], pattern) for pattern in patterns]
    return [name for name in names if name in meta]


def _is_listed(converter: Any) -> bool:
    return converter is not None and isinstance(converter.operations[0], MergeModulelist)


def _works_per_expert(converter: Any) -> bool:
    """Whether a converter treats every expert alike and apart, so that it may be run on a single one."""

    def dims(operation: Any) -> list[int]:
        names = ("dim0", "dim1") if isinstance(operation, Transpose) else ("dim",)
        return [getattr(operation, name) for name in names]

    rest = converter.operations[1:] if _is_listed(converter) else converter.operations
    stacks_first = not _is_listed(converter) or converter.operations[0].dim == 0
    return stacks_first and all(
        isinstance(operation, (Concatenate, Transpose, Interleave)) and min(dims(operation)) > 0 for operation in rest
    )
