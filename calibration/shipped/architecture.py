"""The shipped models before training: a Qwen3-VL-MoE, its dense twins, and the processor that all share."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from expertflow_quant.models.processor import ImageProcessor
from expertflow_quant.samples import make_sheet
from expertflow_quant.samples.canvas import SIZE
from expertflow_quant.samples.item import SUFFIX

KINDS = ("moe", "dense", "dense-total")
PATCH = 8
MERGE = 2
VOCABULARY = 1280
LAYERS = 6
HIDDEN = 256
EXPERTS = 16
TOP_K = 2
INTERMEDIATE = 96
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
VISION = dict(depth=7, hidden_size=128, intermediate_size=512, num_heads=4)
SPECIALS = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
# Words with the blank before them, digits one by one, as Qwen's tokenizers split.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Newlines are written as expressions: jinja drops a literal one in front of a block.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def corpus(sheets: int) -> Iterable[str]:
    """Chats of training sheets, for the tokenizer."""
    for i in range(sheets):
        for task in ("chart", "document"):
            for question in make_sheet(task, "train", f"tokenizer/{i}").questions:
                yield f"user\n{question.text}{SUFFIX[task]}"
                yield f"assistant\n{question.answers[0]}"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=SPECIALS,
        model_max_length=2048,
    )


def build_processor(sheets: int = 2500) -> ImageProcessor:
    """The processor of all models."""
    images = Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    )
    return ImageProcessor(
        image_processor=images, tokenizer=build_tokenizer(corpus(sheets)), chat_template=CHAT_TEMPLATE
    )


def save_processor(processor: ImageProcessor, path: Path) -> None:
    """Write the processor under its stock class with a video half, so that the stock AutoProcessor reads it whole."""
    processor.save_pretrained(path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = path / name
        content = json.loads(file.read_text())
        content["processor_class"] = "Qwen3VLProcessor"
        if name == "processor_config.json" and "video_processor" not in content:
            shared = {k: v for k, v in content["image_processor"].items() if k != "image_processor_type"}
            content["video_processor"] = shared | {"video_processor_type": "Qwen3VLVideoProcessor"}
        file.write_text(json.dumps(content, indent=2) + "\n")


def build_model(kind: str, processor: ImageProcessor) -> Any:
    """A freshly initialised model of one of KINDS; "dense" has as many parameters as a token of "moe" uses,
    "dense-total" as many as "moe" has in all, but for routers."""
    tokenizer = processor.tokenizer
    section = HEAD_DIM // 2 // 3
    text: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        intermediate_size=(EXPERTS if kind == "dense-total" else TOP_K) * INTERMEDIATE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 500.0,
            "mrope_section": [HEAD_DIM // 2 - 2 * section, section, section],
            "mrope_interleaved": True,
        },
    )
    vision = VISION | dict(
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=HIDDEN,
        num_position_embeddings=(SIZE // PATCH) ** 2,
        deepstack_visual_indexes=[3],
    )
    ids = dict(
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )
    if kind == "moe":
        text |= dict(
            moe_intermediate_size=INTERMEDIATE,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
        )
        model: Any = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids))
    elif kind in KINDS:
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    else:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def main() -> None:
    """Write an untrained model with its processor."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(args.kind, processor).to(torch.bfloat16)
    model.save_pretrained(args.out)
    save_processor(processor, args.out)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
