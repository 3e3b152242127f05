"""Experts of a trained model and what they are given, and the folder in which another package finds one of them.

Other packages quantize models, not matrices. So an expert becomes the MLP of a one-layer Llama whose embeddings are the
samples: token t is sample t, attention adds a millionth, and the norm before the MLP hands the samples on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.pipeline.stream import ModelStream

SEQUENCE = 128
"""Tokens of a calibration sequence; samples come in multiples of it."""


@dataclass(frozen=True)
class Expert:
    """float32 weights of gate and up ``[I, H]`` and down ``[H, I]``; ``samples [T, H]`` to calibrate on and ``unseen``
    ones, all exact in fp16."""

    name: str
    gate: Tensor
    up: Tensor
    down: Tensor
    samples: Tensor
    unseen: Tensor

    def output(self, rows: Tensor) -> Tensor:
        return output(rows, torch.ones(rows.shape[1]), self.gate, self.up, self.down)

    def errors(self, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> dict[str, float]:
        """Relative output errors of quantized weights, ``norm [H]`` multiplying what comes in."""
        found = {}
        for name, rows in (("samples", self.samples), ("unseen", self.unseen)):
            wanted = self.output(rows)
            found[name] = float((output(rows, norm, gate, up, down) - wanted).norm() / wanted.norm())
        return found


def output(rows: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The MLP's answer ``[T, H]``."""
    rows = rows * norm
    return (functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T


def trained_experts(model: Path, layers: list[int], conversations: int, most: int) -> list[Expert]:
    """Of each of ``layers`` the two experts with most tokens side by side, as one of twice the width: a peer's AWQ
    takes rows in multiples of 64. At most ``most`` of the tokens that chose either are samples, as many are unseen."""
    stream = ModelStream(model)
    data = CalibrationData.from_samples(load_processor(stream.folder), generated_samples(conversations))
    found = []
    for observed in Observations(stream, data).layers():
        index = observed.layer.index
        if index in layers:
            chosen = sorted(range(observed.layer.experts), key=lambda expert: -observed.counts[expert])[:2]
            rows = torch.cat([observed.rows(expert).inputs.float() for expert in chosen])
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(index))]
            rows = (rows / rows.square().mean(-1, keepdim=True).sqrt()).half().float()
            count = min(most, len(rows) // 2) // SEQUENCE * SEQUENCE
            weights = [stream.expert(index, expert) for expert in chosen]
            gates, ups = zip(*(each.gate_up.float().chunk(2) for each in weights), strict=True)
            name = f"layer {index}, experts {chosen[0]} and {chosen[1]}"
            parts = torch.cat(gates), torch.cat(ups), torch.cat([each.down.float() for each in weights], dim=1)
            found.append(Expert(name, *(part.half().float() for part in parts), rows[:count], rows[count : 2 * count]))
    stream.close()
    return found


def write_llama(expert: Expert, folder: Path) -> None:
    """The model folder that holds ``expert``, with a tokenizer, which packages want to find."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    count, hidden = expert.samples.shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=len(expert.gate),
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=count,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(expert.samples)
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.mul_(1e-6)
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").weight.copy_(getattr(expert, name))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(count)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="0", pad_token="0").save_pretrained(folder)
