"""A Mixture-of-Experts model folder with random weights, written tensor by tensor: of any size, in little memory."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from expertflow_quant.checkpoint.tensors import PendingTensor, write_tensors

POOL = 1 << 22
SHARD_BYTES = 10**9
STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen3-MoE text model; every layer is an MoE layer."""

    layers: int = 42
    experts: int = 64
    hidden: int = 1024
    intermediate: int = 512
    vocabulary: int = 65536
    heads: int = 16
    top_k: int = 4

    @property
    def config(self) -> Any:
        return transformers.Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 4),
            head_dim=64,
            intermediate_size=self.intermediate,
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16",
        )

    @property
    def layer_bytes(self) -> int:
        """One decoder layer in bf16: experts, router, attention, norms."""
        return 2 * sum(_numel(shape) for name, shape in self.tensors if name.startswith("model.layers.0."))

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes as such models lie on the hub: each expert's three matrices apart."""
        named = [("model.embed_tokens.weight", (self.vocabulary, self.hidden))]
        for layer in range(self.layers):
            named += [(f"model.layers.{layer}.{name}", shape) for name, shape in self._layer()]
        return [*named, ("model.norm.weight", (self.hidden,)), ("lm_head.weight", (self.vocabulary, self.hidden))]

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        wide, narrow = 64 * self.heads, 64 * max(1, self.heads // 4)
        yield "input_layernorm.weight", (self.hidden,)
        for name, out in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"self_attn.{name}_proj.weight", (out, self.hidden)
        yield "self_attn.o_proj.weight", (self.hidden, wide)
        yield "self_attn.q_norm.weight", (64,)
        yield "self_attn.k_norm.weight", (64,)
        yield "post_attention_layernorm.weight", (self.hidden,)
        yield "mlp.gate.weight", (self.experts, self.hidden)
        for expert in range(self.experts):
            for name in ("gate", "up"):
                yield f"mlp.experts.{expert}.{name}_proj.weight", (self.intermediate, self.hidden)
            yield f"mlp.experts.{expert}.down_proj.weight", (self.hidden, self.intermediate)


def write_model(folder: Path, sizes: Sizes, seed: int, progress: Callable[[int, int], None]) -> int:
    """Writes config and shards of about a gigabyte; returns the bytes of all weights. One tensor is in memory at a
    time, its numbers a stretch of a pool of four million normal ones that begins at random."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL).normal_(std=STD, generator=generator).bfloat16()
    tensors = [_pending(name, shape, pool, generator) for name, shape in sizes.tensors]
    total = sum(tensor.nbytes for tensor in tensors)
    number = [done // SHARD_BYTES for done in accumulate(tensor.nbytes for tensor in tensors)]
    weight_map, written = {}, 0
    for shard in range(number[-1] + 1):
        name = f"model-{shard + 1:05d}-of-{number[-1] + 1:05d}.safetensors"
        part = [tensor for tensor, of in zip(tensors, number, strict=True) if of == shard]
        written += write_tensors(folder / name, part)[0]
        weight_map |= {tensor.name: name for tensor in part}
        progress(written, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes.config.save_pretrained(folder)
    return total


def _pending(name: str, shape: tuple[int, ...], pool: Tensor, generator: torch.Generator) -> PendingTensor:
    if len(shape) == 1:
        return PendingTensor.ready(name, torch.ones(shape, dtype=torch.bfloat16))
    start = int(torch.randint(POOL, (1,), generator=generator))
    return PendingTensor(name, torch.bfloat16, shape, partial(_stretch, pool, start, shape))


def _stretch(pool: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    wanted = _numel(shape)
    repeats = -(-(start + wanted) // POOL)
    return (pool.repeat(repeats) if repeats > 1 else pool)[start : start + wanted].view(shape)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
