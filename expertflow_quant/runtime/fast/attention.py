"""Our attention in transformers' registry, and the cache object that lets it see the keys and values as they come.

A model gives its new keys and values to a transformers Cache, then calls the attention function with what the cache
returns. ``PassThrough`` returns them as they are, so the function gets exactly the new tokens and keeps them in rows
of its own (kv.py). No mask is ever built: masks are only made for implementations that registered one.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.runtime.fast import passes

NAME = "expertflow"

IGNORED = frozenset({"dropout", "position_ids", "use_cache", "is_causal", "cache_position", "output_attentions"})
"""Arguments that say nothing about one causal pass without dropout."""


class _NoLayers(list[Any]):
    """Layers of a cache for models that only ask how many there are: recurrent and convolutional layers take theirs."""

    def __getitem__(self, layer: Any) -> Any:
        raise ExpertFlowError(f"layer {layer} keeps a state of its own in the cache, which is not there")


class PassThrough(Cache):
    """A cache that keeps nothing."""

    def __init__(self) -> None:
        self.layers: list[Any] = _NoLayers()
        self.layer_class_to_replicate = None
        self.offloading = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def __len__(self) -> int:
        return 0


@torch.compiler.disable
def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Raises ExpertFlowError outside a pass and for what is not implemented, by name."""
    the_pass = passes.current()
    odd = [name for name, given in kwargs.items() if given is not None and given is not False and name not in IGNORED]
    if the_pass is None or attention_mask is not None or odd:
        raise ExpertFlowError(
            f"{type(module).__name__} asks the fast path's attention for "
            f"{', '.join(odd) or ('a mask of its own' if the_pass else 'a pass outside the engine')}, which is not "
            "there: use the plain path (fast=False)"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = passes.AttentionOptions(scale, sliding_window, s_aux)
    return the_pass.attention(module.layer_idx, query, key, value, options), None


AttentionInterface.register(NAME, attention_forward)
