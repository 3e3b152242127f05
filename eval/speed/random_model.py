"""A shape as a model with random weights, made on its device; experts are left out, or kept in host memory.

The model is built on the meta device, where it costs nothing, and each weight is drawn where it will live: the
experts of a 30-billion-parameter model never exist as a whole in bf16 unless somebody asks for them.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertflow_quant.formats import ExpertFlowError, ExpertShape
from expertflow_quant.models.seams import (
    expert_modules,
    expert_parameters,
    expert_shape,
    model_class,
    num_experts,
    top_k,
)
from expertflow_quant.runtime.experts import NAME

NOISE_BIAS = 0.02


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a model: its experts module by name and as it is, the sizes of its experts, its routing."""

    name: str
    module: Any
    shape: ExpertShape
    experts: int
    top_k: int


@dataclass(frozen=True)
class RandomModel:
    """A transformers model in eval mode, and its MoE layers in model order."""

    model: Any
    layers: tuple[MoeLayer, ...]


def moe_layers(model: Any) -> tuple[MoeLayer, ...]:
    """The MoE layers of a model that holds its experts (on meta, too)."""
    return tuple(
        MoeLayer(name, module, expert_shape(module), num_experts(module), top_k(model, name))
        for name, module in expert_modules(model)
    )


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of ``config``, all of it on the meta device."""
    with torch.device("meta"):
        return model_class(config)._from_config(copy.deepcopy(config), dtype=dtype).eval()


def random_backbone(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> RandomModel:
    """All but the experts on ``device`` in ``dtype``; the experts modules have no parameters and run ours."""
    model = meta_model(config, dtype)
    layers = moe_layers(model)
    for layer in layers:
        for name in expert_parameters(layer.module).values():
            del layer.module._parameters[name]
        layer.module._is_hf_initialized = True  # otherwise transformers initialises the absent parameters
    model.set_experts_implementation(NAME)
    _materialize(model, device, dtype, seed)
    return RandomModel(model, layers)


def random_whole(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> RandomModel:
    """Like ``random_backbone``, with the experts as plain parameters in host memory, as transformers has them."""
    model = meta_model(config, dtype)
    layers = moe_layers(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for name in expert_parameters(layer.module).values():
            old = layer.module.get_parameter(name)
            fan_in = layer.shape.intermediate if name.startswith("down") else layer.shape.hidden
            one = torch.randn(old.shape[1:], generator=generator) / math.sqrt(fan_in)
            # drawing every expert would take minutes, and nothing measured here depends on their differing
            weight = torch.empty(old.shape, dtype=dtype).copy_(one.expand(old.shape))
            layer.module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    _materialize(model, device, dtype, seed)
    return RandomModel(model, layers)


def _materialize(model: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give every parameter and buffer that is still on meta a value on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if id(old) not in made:
                    value = _noise(module, name, old, device, dtype, generator)
                    made[id(old)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = made[id(old)]
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            _rebuild_buffers(module, device)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ExpertFlowError(f"{type(model).__name__}: {', '.join(left[:3])} got no values: use another shape")


def _noise(
    module: nn.Module, name: str, old: Tensor, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if "norm" in type(module).__name__.lower():
        return torch.full(old.shape, float(name == "weight"), device=device, dtype=dtype)
    std = 1 / math.sqrt(old[0].numel()) if old.ndim > 1 else NOISE_BIAS
    return torch.randn(old.shape, device=device, dtype=dtype, generator=generator).mul_(std)


def _rebuild_buffers(module: Any, device: torch.device) -> None:
    """Rotary frequencies and kin follow from the config, so a module made anew has them."""
    if not hasattr(module, "config"):
        raise ExpertFlowError(f"{type(module).__name__} has buffers and no config to make them from: use another shape")
    fresh = type(module)(module.config)
    for name, buffer in fresh._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
