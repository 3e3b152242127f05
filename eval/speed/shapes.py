"""Named shapes: transformers configs with the published sizes of known models, whole, with fewer layers, or tiny.

A shape has no weights. Times and bytes depend on sizes and routes alone, so random weights do for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from expertflow_quant.formats import ExpertFlowError, Format

TINY_LAYERS = 2
TINY_FORMAT = "int4-g16"


@dataclass(frozen=True)
class Shape:
    """A model's sizes: ``config`` has ``layers`` of the ``whole_layers`` of the published model; ``format`` is the
    usual int4 format whose groups divide these sizes."""

    name: str
    config: Any
    layers: int
    whole_layers: int
    format: str


@dataclass(frozen=True)
class _Published:
    make: Callable[[dict[str, Any]], Any]
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    format: str = "int4-g128"


def named_shape(name: str, layers: int | None = None, tiny: bool = False) -> Shape:
    """The shape called ``name``, or its tiny variant; ``layers`` keeps the first ones only.

    Raises ExpertFlowError for a name or a number of layers that it does not have.
    """
    if name not in SHAPES:
        raise ExpertFlowError(f"shape {name!r} is not known: use one of {', '.join(SHAPES)}")
    published = SHAPES[name]
    sizes = {**published.sizes, **(published.tiny if tiny else {})}
    whole = int(sizes["num_hidden_layers"])
    kept = whole if layers is None else layers
    if not 1 <= kept <= whole:
        raise ExpertFlowError(f"{name} has {whole} layers, not {kept}: give 1 to {whole}")
    config = published.make({**sizes, "num_hidden_layers": kept})
    chosen = TINY_FORMAT if tiny else published.format
    return Shape(f"{name} (tiny)" if tiny else name, config, kept, whole, Format.parse(chosen).name)


def _qwen3_moe(sizes: dict[str, Any]) -> Any:
    return transformers.Qwen3MoeConfig(**sizes)


def _qwen3_vl_moe(sizes: dict[str, Any]) -> Any:
    text = {key: value for key, value in sizes.items() if key != "vision"}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=sizes["vision"], tie_word_embeddings=False)


def _mixtral(sizes: dict[str, Any]) -> Any:
    return transformers.MixtralConfig(**sizes)


def _olmoe(sizes: dict[str, Any]) -> Any:
    return transformers.OlmoeConfig(**sizes)


def _gpt_oss(sizes: dict[str, Any]) -> Any:
    kinds = ("sliding_attention", "full_attention")
    return transformers.GptOssConfig(**sizes, layer_types=[kinds[i % 2] for i in range(sizes["num_hidden_layers"])])


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


_QWEN3 = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_parameters": _rope(1e6),
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_TINY_VISION = {
    **_VISION,
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
_MIXTRAL = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_parameters": _rope(1e6),
}
_OLMOE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rope_parameters": _rope(1e4),
}
_GPT_OSS = {
    "hidden_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": TINY_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 256,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_TINY_QWEN3 = {**_TINY, "head_dim": 16, "moe_intermediate_size": 48, "num_experts": 8}
_MROPE = {"mrope_interleaved": True}

SHAPES = {
    "Qwen3-VL-30B-A3B": _Published(
        _qwen3_vl_moe,
        {
            **_QWEN3,
            "max_position_embeddings": 262144,
            "rope_parameters": _rope(5e6, mrope_section=[24, 20, 20], **_MROPE),
            "vision": _VISION,
        },
        {**_TINY_QWEN3, "rope_parameters": _rope(1e4, mrope_section=[2, 3, 3], **_MROPE), "vision": _TINY_VISION},
    ),
    "Qwen3-30B-A3B": _Published(_qwen3_moe, _QWEN3, _TINY_QWEN3),
    "Mixtral-8x7B": _Published(_mixtral, _MIXTRAL, {**_TINY, "num_local_experts": 4}),
    "OLMoE": _Published(_olmoe, _OLMOE, {**_TINY, "num_experts": 8}),
    # 2,880 columns are no multiple of 128
    "gpt-oss-20b": _Published(_gpt_oss, _GPT_OSS, {**_TINY, "head_dim": 16, "num_local_experts": 4}, "int4-g64"),
}
"""Every named shape."""
