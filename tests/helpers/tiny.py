"""Tiny random models of several families, and checkpoints of them written without the pipeline."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from expertflow_quant.checkpoint.manifest import ExpertEntry
from expertflow_quant.checkpoint.tensors import PendingTensor
from expertflow_quant.checkpoint.writer import CheckpointWriter
from expertflow_quant.formats.bits import pack_codes
from expertflow_quant.formats.nf4 import NF4_VALUES
from expertflow_quant.formats.record import RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.models.processor import ImageProcessor
from expertflow_quant.models.seams import expert_modules, expert_parameters, expert_shape, top_k

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISION_START, VISION_END, IMAGE, VIDEO = 3, 4, 5, 6
VOCABULARY = 256 + len(SPECIALS)
CHAT_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 48, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}

FAMILIES = ("qwen3_vl_moe", "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "nemotron_h")

FormatOf = Callable[[int, int], str]


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random float32 model of ``family`` in eval mode; experts drawn wide enough to matter."""
    torch.manual_seed(seed)
    model = _MAKERS[family]().eval()
    for _, module in expert_modules(model):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def bf16_experts(model: Any) -> Any:
    """The model with its experts rounded to bf16 (still float32), so that bf16 records lose nothing."""
    for _, module in expert_modules(model):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return model


def model_inputs(family: str, rows: int = 2, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """A batch of random prompts, with an image in each for the vision-language family."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIALS), VOCABULARY, (rows, length), generator=generator)
    if family != "qwen3_vl_moe":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = torch.tensor([[VISION_START, *[IMAGE] * 16, VISION_END]]).repeat(rows, 1)
    ids = torch.cat([ids[:, :4], image, ids[:, 4:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(64 * rows, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * rows),
    }


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token, after the specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS),
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(family: str, folder: Path) -> None:
    """The family's processor: byte tokens, and images in patches of 4 for the vision-language one."""
    tokenizer = byte_tokenizer()
    if family != "qwen3_vl_moe":
        tokenizer.save_pretrained(folder)
        return
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )
    ImageProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {"processor_class": "Qwen3VLProcessor"}
        if "image_processor" in content:
            shared = {key: value for key, value in content["image_processor"].items() if key != "image_processor_type"}
            content["video_processor"] = shared | {"video_processor_type": "Qwen3VLVideoProcessor"}
        (folder / name).write_text(json.dumps(content))


def write_checkpoint(
    model: Any,
    folder: Path,
    format_of: FormatOf,
    *,
    input_scale: bool = False,
    shard_bytes: int = 4 * 10**9,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of ``model`` by plain rounding, expert (layer, index) in format ``format_of(layer,
    index)``."""
    writer = CheckpointWriter(folder, {"test": True})
    kept = dict(model.state_dict())
    for layer, (name, module) in enumerate(expert_modules(model)):
        experts = [
            _record(module, expert, Format.parse(format_of(layer, expert)), input_scale)
            for expert in range(module.num_experts)
        ]
        writer.write_layer(layer, name, expert_shape(module), top_k(model, name), experts)
        for parameter in expert_parameters(module).values():
            del kept[f"{name}.{parameter}"]
    backbone = [PendingTensor.ready(name, tensor.contiguous()) for name, tensor in kept.items()]
    writer.write_backbone(backbone, shard_bytes)
    ours = {"quantization_config": {"quant_method": "expertflow", "version": 1}}
    written = json.loads(model.config.to_json_string(use_diff=False)) | ours | (config or {})
    writer.write_json("config.json", written | {"architectures": [type(model).__name__]})
    writer.write_json("generation_config.json", json.loads(model.generation_config.to_json_string()))
    writer.finish(folder.name, model.config.model_type, {})
    return folder


def dequantized(model: Any, format_of: FormatOf, input_scale: bool = False) -> Any:
    """A plain copy of ``model`` whose expert weights are what ``write_checkpoint`` stored, decoded by
    hand."""
    twin = copy.deepcopy(model)
    for layer, (_, module) in enumerate(expert_modules(twin)):
        for expert in range(module.num_experts):
            weights = _weights(module, expert)
            scale = _scale(weights["gate_up"]) if input_scale else None
            for key, parameter in expert_parameters(module).items():
                weight = weights[key]
                if weight.ndim == 1:
                    weight = weight.bfloat16().float()
                else:
                    weight = _decoded(
                        weight, Format.parse(format_of(layer, expert)), scale if key == "gate_up" else None
                    )
                    weight = weight.T if module.is_transposed else weight
                module.get_parameter(parameter).data[expert] = weight
    return twin


def _decoded(weight: Tensor, format: Format, scale: Tensor | None) -> Tensor:
    if not format.has_codes:
        return weight.bfloat16().float()
    codes, scales, zeros = _rounded(weight if scale is None else weight / scale.float(), format)
    if format.kind == "nf":
        grouped = torch.tensor(NF4_VALUES)[codes.int()].view(*scales.shape, -1)
    else:
        grouped = codes.float().view(*scales.shape, -1) - zeros.float().unsqueeze(-1)
    decoded = (grouped * scales.float().unsqueeze(-1)).view(weight.shape)
    return decoded if scale is None else decoded * scale.float()


def _record(module: Any, expert: int, format: Format, input_scale: bool) -> tuple[ExpertEntry, Tensor]:
    scaled = input_scale and format.has_codes
    layout = RecordLayout(expert_shape(module), format, scaled)
    weights = _weights(module, expert)
    fields: dict[str, Tensor] = {}
    for key in ("gate_up", "down"):
        weight = weights[key]
        if not format.has_codes:
            fields[f"{key}.weight"] = weight.bfloat16()
            continue
        if scaled and key == "gate_up":
            fields["gate_up.input_scale"] = _scale(weight)
            weight = weight / _scale(weight).float()
        codes, scales, zeros = _rounded(weight, format)
        fields |= {f"{key}.codes": pack_codes(codes, format.bits), f"{key}.scales": scales}
        if not format.symmetric:
            fields[f"{key}.zeros"] = zeros
    if module.has_bias:
        fields |= {f"{key}.bias": weights[f"{key}_bias"].bfloat16() for key in ("gate_up", "down")}
    return ExpertEntry(format, scaled, layout.nbytes), layout.pack(fields)


def _weights(module: Any, expert: int) -> dict[str, Tensor]:
    """One expert's matrices ``[out, in]`` and biases, float32."""
    found = {
        key: module.get_parameter(name).detach()[expert].float() for key, name in expert_parameters(module).items()
    }
    return {key: value.T if value.ndim == 2 and module.is_transposed else value for key, value in found.items()}


def _scale(weight: Tensor) -> Tensor:
    """Some input scale, fp16 ``[in]``, that is not all ones."""
    return (0.5 + weight.abs().mean(dim=0)).half()


def _rounded(weight: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[O, I]``, scales fp16 ``[O, G]``, zeros uint8 ``[O, G]`` by rounding to the nearest."""
    grouped = weight.reshape(weight.shape[0], format.groups(weight.shape[1]), -1)
    if format.kind == "nf":
        scales = grouped.abs().amax(-1).half()
        distance = (grouped.unsqueeze(-1) - torch.tensor(NF4_VALUES) * scales.float()[..., None, None]).abs()
        return distance.argmin(-1).to(torch.uint8).view(weight.shape), scales, torch.zeros_like(scales).to(torch.uint8)
    if format.symmetric:
        scales = (grouped.abs().amax(-1) / (format.levels // 2 - 1 or 1)).half()
        zeros = torch.full_like(scales, format.levels // 2)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / (format.levels - 1)).half()
        zeros = (-low / scales.float()).round().clamp(0, format.levels - 1)
    codes = (grouped / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round()
    codes = codes.clamp(0, format.levels - 1).to(torch.uint8).view(weight.shape)
    return codes, scales, zeros.to(torch.uint8)


def _qwen3_vl_moe() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = {**TEXT, **MOE, "rope_parameters": rope, "tie_word_embeddings": True}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **MOE))


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**TEXT, intermediate_size=48, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def _gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **TEXT,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
    )
    return transformers.GptOssForCausalLM(config)


def _olmoe() -> Any:
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = transformers.OlmoeConfig(**text, intermediate_size=48, num_experts=8, num_experts_per_tok=2)
    return transformers.OlmoeForCausalLM(config)


def _deepseek_v3() -> Any:
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(
        **text,
        intermediate_size=64,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_shared_experts=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _nemotron_h() -> Any:
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    config = transformers.NemotronHConfig(
        **text,
        layers_block_type=["full_attention", "moe", "full_attention", "moe"],
        intermediate_size=64,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    )
    return transformers.NemotronHForCausalLM(config)


_MAKERS = {
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "nemotron_h": _nemotron_h,
}
