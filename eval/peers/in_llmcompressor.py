"""``python -m eval.peers.in_llmcompressor JOBS``: run by ``python -m eval peers`` in llm-compressor's own environment.

Every job names a model folder, a method, a format and the file for the MLP's weights as they will run. Nothing of this
repository is imported here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def quantize(job: dict[str, Any], sequence: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    starts = range(0, model.config.vocab_size, sequence)
    rows = {
        "input_ids": [list(range(start, start + sequence)) for start in starts],
        "attention_mask": [[1] * sequence for _ in starts],
    }
    form = QuantizationArgs(num_bits=job["bits"], symmetric=job["symmetric"], strategy="group", group_size=job["group"])
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=form)}
    recipe = (
        [GPTQModifier(config_groups=groups, ignore=["lm_head"], **job["options"])]
        if job["method"] == "gptq"
        else [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    )
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=sequence,
        num_calibration_samples=len(starts),
    )
    layer = model.model.layers[0]
    found = {"norm": layer.post_attention_layernorm.weight.detach().float().clone()}
    for name in ("gate", "up", "down"):
        linear = getattr(layer.mlp, f"{name}_proj")
        zeros, scheme = getattr(linear, "weight_zero_point", None), linear.quantization_scheme.weights
        found[name] = fake_quantize(linear.weight.detach(), linear.weight_scale, zeros, scheme).float()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["out"])


def unpinned(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """In place of Tensor.pin_memory, which AWQ calls whatever the device, and which fails without a GPU."""
    return tensor


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = unpinned  # type: ignore[method-assign]
    wanted = json.loads(Path(sys.argv[1]).read_text())
    for each in wanted["jobs"]:
        quantize(each, wanted["sequence"])
