"""Tiny checkpoints behind the fast path and the plain one, and conversations to ask both."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import resident, tiny
from helpers.records import random_record
from PIL import Image

import expertflow_quant
from expertflow_quant import Engine
from expertflow_quant.formats import Format, RecordLayout
from expertflow_quant.models.seams import expert_modules, expert_parameters, expert_shape, top_k
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.experts import NAME, LayerExperts, attach
from expertflow_quant.runtime.fast.build import FastOptions, build_fast
from expertflow_quant.runtime.fast.loop import FastRunner

REFUSED = "deepseek_v3"
"""Its keys and values have heads of two sizes."""

TAKEN = tuple(family for family in tiny.FAMILIES if family != REFUSED)
FORMATS = ("int4-g16", "bf16", "int8-g16", "int3-g16-asym", "int2-g16")
"""Of five record sizes."""


def mixed(layer: int, expert: int) -> str:
    return FORMATS[(layer + expert) % len(FORMATS)]


def checkpoint(
    folder: Path, family: str, format_of: tiny.FormatOf = mixed, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint of the tiny random model with its processor; ``config`` overrides entries of config.json."""
    tiny.write_checkpoint(tiny.tiny_model(family), folder, format_of, config=config)
    beside = folder.with_name(f"{folder.name}.processor")
    tiny.save_processor(family, beside)
    for file in beside.iterdir():
        shutil.copy(file, folder)
    return folder


def load_fast(folder: Path, memory: int | str = "100%", rows: int = 4, room: int = 160, **options: Any) -> Engine:
    return expertflow_quant.load(folder, memory, fast=True, options=FastOptions(rows=rows, room=room, **options))


def rebuilt(engine: Engine, memory: int | str, options: FastOptions, **hooks: Any) -> FastRunner:
    """Another runner for the model of a fast engine, with build_fast's hooks."""
    model = engine.model
    budget = parse_budget(memory, model.expert_store.nbytes)
    return build_fast(model, engine.tokenizer, engine.end_ids, budget, options, **hooks)


def smallest_budget(engine: Engine) -> int:
    """Two records of the largest size: nothing is resident."""
    return 2 * max(max(layer.nbytes) for layer in engine.model.expert_store.layers)


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def asked(text: str = "How many?", *images: Image.Image) -> list[dict[str, Any]]:
    if not images:
        return [{"role": "user", "content": text}]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


TEXTS = (
    "hello there you",
    "what is this thing called, do you know?",
    "a",
    "once more, then: two and two",
    "?",
    "the sixth of them",
    "well well",
    "a last one that is a little longer than the others",
)
CONVERSATIONS = [asked(text) for text in TEXTS]


def tokens(engine: Engine, conversations: Sequence[Any], count: int = 10, **options: Any) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in engine.generate(conversations, count, **options)]


def one_by_one(engine: Engine, conversations: Sequence[Any], count: int = 10) -> list[tuple[int, ...]]:
    """What each conversation gets when it is alone, without padding."""
    return [tokens(engine, [conversation], count)[0] for conversation in conversations]


class RandomExperts:
    """What a store reads: every layer's experts in ``formats`` in turn, ``DISTINCT`` different records of each."""

    DISTINCT = 24

    def __init__(self, model: Any, formats: Sequence[str]) -> None:
        parsed = [Format.parse(each) for each in formats]
        shapes = [(expert_shape(module), module.num_experts, name) for name, module in expert_modules(model)]
        self.layers = []
        for shape, count, name in shapes:
            layouts = [RecordLayout(shape, parsed[expert % len(parsed)], False) for expert in range(count)]
            self.layers.append(resident.Layer(layouts, top_k(model, name), name, shape))
        generator = torch.Generator().manual_seed(3)
        self._records = [self._made(layout, generator) for layout in self.layers[0].layouts[: len(parsed)]]

    def _made(self, layout: RecordLayout, generator: torch.Generator) -> list[torch.Tensor]:
        records = [random_record(layout, generator) for _ in range(self.DISTINCT)]
        for record in records:
            for name, field in layout.views(record).items():
                if name.endswith((".scales", ".weight")):
                    field.mul_(0.3)  # about as wide as trained weights of these sizes are
        return records

    def record(self, layer: int, expert: int) -> torch.Tensor:
        turn, which = divmod(expert, len(self._records))
        return self._records[which][(7 * layer + turn) % self.DISTINCT]


def random_moe(config: Any, formats: Sequence[str], device: str, dtype: torch.dtype) -> Any:
    """A random Qwen3-MoE that has its experts in a store only."""
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=dtype).eval()
    model.expert_store = ExpertStore(RandomExperts(model, formats), pin=device != "cpu")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        for layer, (_, module) in enumerate(expert_modules(model)):
            for name in expert_parameters(module).values():
                del module._parameters[name]
            attach(module, LayerExperts(None, layer))
            router = model.model.layers[layer].mlp.gate.weight
            router.copy_(torch.randn_like(router) * router.shape[1] ** -0.5)
    model.set_experts_implementation(NAME)
    return model
