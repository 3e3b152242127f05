"""What calibration should see: batches with padding, and what the plain model gives its experts for them."""

from functools import partial
from pathlib import Path

import torch
from helpers import tiny
from torch import Tensor

from expertflow_quant.models.seams import expert_modules, model_class
from expertflow_quant.pipeline.stream import ModelStream


def padded_batches(family: str) -> list[dict[str, Tensor]]:
    """Two batches, the second with padding at the end of its rows."""
    batches = [
        tiny.model_inputs(family, rows=2, seed=1),
        tiny.model_inputs(family, rows=3, length=15, seed=2),
    ]
    batches[1]["attention_mask"][1, -4:] = 0
    batches[1]["attention_mask"][2, -1:] = 0
    return batches


def save_model(family: str, folder: Path) -> Path:
    tiny.tiny_model(family).save_pretrained(folder)
    return folder


def calls_of_the_plain_model(folder: Path, batches: list[dict[str, Tensor]]) -> list[list[tuple[Tensor, ...]]]:
    """Per MoE layer, per batch: (hidden, ids, affinities) that transformers' own forward gives its
    experts."""
    stream = ModelStream(folder)
    model = model_class(stream.config).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    seen: list[list[tuple[Tensor, ...]]] = []
    for _, module in expert_modules(model):
        seen.append([])
        module.register_forward_pre_hook(partial(lambda calls, module, args: calls.append(args), seen[-1]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return seen
