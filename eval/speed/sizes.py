"""What a pass of a model must at least read and multiply, from its config: the ground of the bounds."""

from dataclasses import dataclass
from typing import Any

from eval.speed.bounds import Work
from eval.speed.random_model import MoeLayer
from expertflow_quant.formats import BF16, RecordLayout


@dataclass(frozen=True)
class ModelSizes:
    """Of the layers that run. ``body`` and ``head``: parameters outside the experts that every token meets, and those
    that only a next token needs; ``windows``: per attention layer how many tokens it looks back, None for all;
    ``kv_values`` that one layer keeps of a token; ``attention_width``: heads x head size; ``expert_values``: weights
    of one expert; ``experts``: of all ``moe_layers``; ``routed``: experts that one token meets in all layers."""

    body: int
    head: int
    windows: tuple[int | None, ...]
    kv_values: int
    attention_width: int
    expert_values: int
    moe_layers: int
    experts: int
    routed: int
    bf16_expert_bytes: int

    def decode_work(
        self, *, moved: float, distinct: float, record: float, rows: int, context: float, item: int
    ) -> Work:
        """An average decode step: ``distinct`` experts a layer of ``record`` bytes each, ``context`` tokens so far,
        values of ``item`` bytes."""
        seen = sum(min(context, window or context) for window in self.windows)
        read = (self.body + self.head + rows * seen * self.kv_values) * item + distinct * self.moe_layers * record
        flops = 2 * rows * (self.body + self.head + self.routed * self.expert_values)
        return Work(moved, read, flops + 4 * rows * seen * self.attention_width)

    def prefill_work(self, *, moved: float, distinct: float, record: float, rows: int, prompt: int, item: int) -> Work:
        """A prefill of ``rows`` prompts of ``prompt`` tokens; the head is for each prompt's last token."""
        pairs = sum(_causal_pairs(prompt, window) for window in self.windows)
        read = (self.body + self.head) * item + distinct * self.moe_layers * record
        products = 2 * rows * (prompt * (self.body + self.routed * self.expert_values) + self.head)
        return Work(moved, read, products + 4 * rows * pairs * self.attention_width)


def model_sizes(model: Any, layers: tuple[MoeLayer, ...]) -> ModelSizes:
    """The sizes of a model that may be on the meta device, experts included."""
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    first = layers[0].shape
    body, head = _parameters(model, layers)
    return ModelSizes(
        body=body,
        head=head,
        windows=tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        kv_values=2 * text.num_key_value_heads * head_size,
        attention_width=text.num_attention_heads * head_size,
        expert_values=sum(rows * columns for rows, columns in first.matrices.values()),
        moe_layers=len(layers),
        experts=sum(layer.experts for layer in layers),
        routed=sum(layer.top_k for layer in layers),
        bf16_expert_bytes=sum(layer.experts * RecordLayout(layer.shape, BF16).nbytes for layer in layers),
    )


def _parameters(model: Any, layers: tuple[MoeLayer, ...]) -> tuple[int, int]:
    """(body, head): neither the vision tower nor the input embedding, of which a token reads one row."""
    tower = getattr(getattr(model, "model", None), "visual", None)
    left_out = list(tower.parameters()) if tower is not None else []
    left_out += [parameter for layer in layers for parameter in layer.module.parameters()]
    head = model.get_output_embeddings().weight
    left_out += [model.get_input_embeddings().weight, head]
    ids = {id(parameter) for parameter in left_out}
    return sum(p.numel() for p in model.parameters() if id(p) not in ids), head.numel()


def _causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full
