"""Where a transformers model keeps its experts: one contract for every architecture, so no code per model.

transformers gives every experts class on its experts interface the same members: weights ``gate_up_proj`` (or
``up_proj``) and ``down_proj`` with the expert as first dimension, biases ``*_bias``, and flags that say how
they are laid out. What carries a flag or a parameter that we do not know is refused by name.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape

KNOWN_FLAGS = frozenset({"has_gate", "has_bias", "is_transposed", "is_concatenated"})
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
)
CACHE_NAMES = ("cache", "past_key_values")  # of the argument that is the KV cache, since transformers 5.24 and before


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every experts module of a model that holds its weights, in model order.

    Raises ExpertFlowError when there is none, or one that works in a way we do not implement.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not found:
        raise ExpertFlowError(
            f"{type(model).__name__} has no experts module on transformers' experts interface: use a "
            f"Mixture-of-Experts model that transformers runs through it (Qwen-MoE, Mixtral, DeepSeek, "
            f"gpt-oss and kin)"
        )
    for name, module in found:
        _refuse_unknown(name, module)
    return found


def cache_argument(model: nn.Module) -> str:
    """By which name the forward of ``model`` takes its KV cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), CACHE_NAMES[-1])


def is_experts(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers' interface that holds its weights."""
    flagged = all(hasattr(module, name) for name in ("num_experts", *KNOWN_FLAGS))
    return flagged and isinstance(module._parameters.get("down_proj"), torch.Tensor)


def num_experts(module: Any) -> int:
    """How many experts an experts module or a router has."""
    return int(module.num_experts)


def expert_parameters(module: nn.Module) -> dict[str, str]:
    """Our name ("gate_up", "down", "gate_up_bias", "down_bias") to the parameter's name on the module."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = {"gate_up": up, "down": "down_proj"}
    return names | ({"gate_up_bias": f"{up}_bias", "down_bias": "down_proj_bias"} if module.has_bias else {})


def expert_shape(module: nn.Module) -> ExpertShape:
    """The sizes of one expert. Raises ExpertFlowError when gate/up and down do not fit together."""
    names = expert_parameters(module)
    up, down = (tuple(module.get_parameter(names[key]).shape[1:]) for key in ("gate_up", "down"))
    if module.is_transposed:
        up, down = up[::-1], down[::-1]
    intermediate = up[0] // 2 if module.has_gate else up[0]
    if down != (up[1], intermediate) or up[0] != intermediate * (2 if module.has_gate else 1):
        raise ExpertFlowError(
            f"{type(module).__name__}: gate/up is {up} and down is {down} [out, in]; experts whose product "
            f"does not end in the width it began with are not implemented: use another model"
        )
    return ExpertShape(up[1], intermediate, bool(module.has_gate), bool(module.has_bias))


def find_router(model: nn.Module, name: str) -> nn.Module | None:
    """The module that chooses among the experts of module ``name``: a sibling of theirs that knows how
    many."""
    parent, _, own = name.rpartition(".")
    experts = model.get_submodule(name)
    for child_name, child in model.get_submodule(parent).named_children():
        if child_name != own and _router_width(child) == num_experts(experts):
            return child
    return None


def top_k(model: nn.Module, name: str) -> int:
    """How many of module ``name``'s experts a token uses, from its router, its block or the model's config.

    Raises ExpertFlowError when none of them says.
    """
    experts, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    holders: list[object] = [find_router(model, name), parent, getattr(experts, "config", None)]
    holders.append(getattr(getattr(model, "config", None), "text_config", getattr(model, "config", None)))
    for holder in holders:
        for attribute in TOP_K_NAMES:
            value = getattr(holder, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= num_experts(experts):
                return value
    raise ExpertFlowError(
        f"{name}: neither its router, its block nor the config says how many experts a token uses (looked "
        f"for {', '.join(TOP_K_NAMES)}): set num_experts_per_tok in the model's config.json"
    )


def read_config(path: Path | str) -> Any:
    """The transformers config in a model folder. Raises ExpertFlowError when there is none or it is not
    readable."""
    if not (Path(path) / "config.json").is_file():
        raise ExpertFlowError(
            f"{path} holds no config.json: give the folder of a transformers model (download it first)"
        )
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ExpertFlowError(f"{path}/config.json: {error}: transformers must know the model") from error


def model_class(config: Any) -> Any:
    """The transformers class that a config's model is loaded with: the one it names, else image-text, else
    text."""
    for name in getattr(config, "architectures", None) or ():
        if inspect.isclass(found := getattr(transformers, name, None)):
            return found
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ExpertFlowError(
        f"transformers {transformers.__version__} generates text with no {type(config).__name__}: update transformers"
    )


def _router_width(module: nn.Module) -> int | None:
    """How many experts a router scores, or None for a module that is no router."""
    count = getattr(module, "num_experts", None)
    if isinstance(count, int) and not is_experts(module):
        return count
    weight = module._parameters.get("weight")
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def _refuse_unknown(name: str, module: nn.Module) -> None:
    options = inspect.signature(use_experts_implementation).parameters
    odd = [
        flag
        for flag, option in options.items()
        if option.kind is option.KEYWORD_ONLY
        and flag not in KNOWN_FLAGS | {"experts_interface"}
        and getattr(module, flag, option.default) != option.default
    ]
    odd += sorted(set(module._parameters) - set(expert_parameters(module).values()))
    if odd or (next(module.children(), None) is not None and _holds_weights(module)):
        raise ExpertFlowError(
            f"{name} ({type(module).__name__}) has {', '.join(odd) or 'weights in submodules'}, which this "
            f"build does not implement: use another model or a newer expertflow-quant"
        )


def _holds_weights(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def image_ids(config: Any) -> tuple[int, ...]:
    """The token ids that stand for images; none for a model that reads text only."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return tuple(token for token in found if token is not None)
