"""The plan's numbers that the host knows: bytes of weights, of the KV cache, and a bound for a prefill's scratch.

Configs are read by the names that transformers gives sizes in most families; what a family has not, counts zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expertflow_quant.models.seams import expert_parameters, is_experts

ROUND_SMALL, ROUND_LARGE, LARGE = 512, 2 * 2**20, 10 * 2**20
"""torch's CUDA allocator rounds a tensor up to 512 bytes, and takes 2 MiB steps for those of 10 MiB and more."""


def backbone_bytes(model: nn.Module) -> int:
    """Bytes that all weights and buffers besides the experts take on a CUDA device, vision tower included.

    Weights that are tied count once. A model on the meta device will do.
    """
    experts = {
        id(parameter)
        for module in model.modules()
        if is_experts(module)
        for parameter in (module.get_parameter(name) for name in expert_parameters(module).values())
    }
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in experts}
    return sum(_rounded(tensor.nbytes) for tensor in tensors.values())


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in ``dtype``: 2 x KV heads x head size x layers that keep them.

    ``config`` is a model's or its text part's. Layers of windowed attention count as if they kept every token;
    latent attention keeps its latents, as transformers does.
    """
    sizes = TextSizes.of(config)
    return sizes.cached * sizes.kv_layers * dtype.itemsize


def prefill_bytes(
    config: Any,
    tokens: int,
    dtype: torch.dtype,
    rows: int = 1,
    patches: int = 0,
    scored: int = 0,
    routed: int | None = None,
) -> int:
    """A bound for the scratch of one prefill of ``tokens`` tokens (all rows together) and ``patches`` image patches.

    With T tokens, d the bytes of ``dtype``, H hidden, Q queries' width, N keys' and values' width, E experts, K
    experts a token, I an expert's width, D a dense layer's width with the shared experts', V vocabulary, R rows::

        T (d 3H + 12H + 64)                   the residual stream, a norm in float32, positions and masks by token
      + max(T (d (6Q + 6N) + 12 (Q + N))      attention: projections, rotation, KV heads repeated, norms in float32
            + T S (A (3d + 4) + d + 1),       scores, their softmax in float32, a mask
            T (12E + d 3D + d 2H)             router in float32, dense and shared part
            + T K (d (2H + 3I) + 64))         pairs: gathered input, gate and up, product, output row; sorting
      + R V (d + 8)                           logits of the last tokens, and their float32 softmax

    plus, of images, their features, and in place of all that the vision tower's own passes if those take more
    (``vision_bytes``). S is ``scored``: the tokens of the longest row where attention holds the scores of all A heads
    in memory, 0 where its kernels do not (flash attention and kin). It holds where only the last tokens get logits.
    ``routed``: bytes of the experts' products where transformers does not compute them, in place of the line of
    pairs; without it what decodes experts into dense matrices needs their room besides.
    """
    s, d = TextSizes.of(config), dtype.itemsize
    queries, others = s.queries, s.keys + s.values
    stream = tokens * ((3 * d + 12) * s.hidden + 64)
    attention = tokens * (d * 6 * (queries + others) + 12 * (queries + others))
    attention += tokens * scored * (s.heads * (3 * d + 4) + d + 1)
    pairs = tokens * s.top_k * (d * (2 * s.hidden + 3 * s.intermediate) + 64) if routed is None else routed
    feedforward = tokens * (12 * s.experts + d * (3 * s.dense + 2 * s.hidden)) + pairs
    logits = rows * s.vocabulary * (d + 8)
    text = stream + max(attention, feedforward) + logits
    vision = getattr(config, "vision_config", None)
    if vision is None or not patches:
        return text
    during, features = vision_bytes(vision, patches, dtype)
    return max(during, text + features)


def vision_bytes(vision: Any, patches: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bounds for the scratch of a vision tower over ``patches`` patches, and for the features that it leaves.

    With P patches, C values a patch, H hidden, I intermediate, F one set of features: ``P C (4 + d)`` pixels,
    ``P H (4 d + 12)`` stream and norm, then the larger of attention, ``P H (10 d + 48)`` as it rotates queries and
    keys in float32 (three times four bytes of each of four copies), and of ``3 P I d``; F is ``P / merge^2`` tokens
    of the text's width in ``d``, one for the last layer and each deepstack layer, twice while they are put together.
    """
    d, hidden = dtype.itemsize, _first(vision, "hidden_size", "embed_dim")
    intermediate = _first(vision, "intermediate_size") or 4 * hidden
    merge = _first(vision, "spatial_merge_size") or 1
    width = _first(vision, "out_hidden_size") or hidden * merge**2
    values = (_first(vision, "in_channels", "num_channels") or 3) * _first(vision, "patch_size") ** 2
    values *= _first(vision, "temporal_patch_size") or 1
    layers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    features = 2 * layers * -(-patches // merge**2) * width * d
    within = max(hidden * (10 * d + 48), 3 * intermediate * d)
    return patches * (values * (4 + d) + hidden * (4 * d + 12) + within) + features, features


@dataclass(frozen=True)
class TextSizes:
    """Widths of a language model: of all queries of a token in a layer, its keys, its values, what is kept of them in
    the KV cache, and so on."""

    hidden: int
    vocabulary: int
    heads: int
    queries: int
    keys: int
    values: int
    cached: int
    kv_layers: int
    experts: int
    top_k: int
    intermediate: int
    dense: int

    @classmethod
    def of(cls, config: Any) -> "TextSizes":
        """From a transformers config, a composite one's text part."""
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads, hidden = _first(text, "num_attention_heads"), _first(text, "hidden_size")
        key, value, kv_heads = _head_sizes(text, heads, hidden)
        latent = _first(text, "kv_lora_rank")
        expert = _first(text, "moe_intermediate_size", "intermediate_size")
        shared = _first(text, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
        shared += expert * _first(text, "n_shared_experts", "num_shared_experts")
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
        return cls(
            hidden=hidden,
            vocabulary=_first(text, "vocab_size"),
            heads=heads,
            queries=heads * max(key, value),
            keys=kv_heads * key,
            values=kv_heads * value,
            cached=latent + _first(text, "qk_rope_head_dim") if latent else kv_heads * (key + value),
            kv_layers=_kv_layers(text),
            experts=experts,
            top_k=_first(text, "num_experts_per_tok", "top_k_experts", "moe_top_k") if experts else 0,
            intermediate=expert if experts else 0,
            dense=max(_first(text, "intermediate_size"), shared),
        )


def _head_sizes(text: Any, heads: int, hidden: int) -> tuple[int, int, int]:
    """Sizes of a key and a value of one head, and how many heads have their own."""
    if _first(text, "kv_lora_rank"):
        return _first(text, "qk_nope_head_dim") + _first(text, "qk_rope_head_dim"), _first(text, "v_head_dim"), heads
    size = _first(text, "head_dim") or hidden // heads
    return size, size, _first(text, "num_key_value_heads") or heads


def _kv_layers(text: Any) -> int:
    """Layers that keep keys and values; the others of a hybrid model keep a state of fixed size, or nothing."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        return _first(text, "num_hidden_layers")
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def _first(config: Any, *names: str) -> int:
    """The first of these sizes that the config gives, else 0."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def _rounded(nbytes: int) -> int:
    step = ROUND_LARGE if nbytes >= LARGE else ROUND_SMALL
    return -(-nbytes // step) * step
