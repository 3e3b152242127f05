"""The models' forward pass for training: fixed shapes, no host synchronisation, several questions per picture.

It computes what the transformers classes compute from the same parameters (a test holds them equal), with three
differences in form only: pictures go through the tower as one batch; the questions about one picture share its
prefix; the experts' product is one grouped product over tokens sorted by expert (or, without a GPU, one dense
product over all experts, weighted by the router).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from calibration.shipped.architecture import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MERGE,
    PATCH,
    TOP_K,
    VISION,
)
from calibration.shipped.feed import CELLS, PATCHES, QUESTIONS, SLOT, TRANSCRIPT
from expertflow_quant.samples.canvas import SIZE

Params = dict[str, Tensor]
GRID = SIZE // PATCH


def constants(model: Any, processor: Any, device: str) -> dict[str, Any]:
    """Rotary tables, positions and the token prefix, all taken from the model itself."""
    tokenizer = processor.tokenizer
    head = tokenizer("<|im_start|>user\n<|vision_start|>", add_special_tokens=False)["input_ids"]
    tail = tokenizer("<|vision_end|>", add_special_tokens=False)["input_ids"]
    prefix = torch.tensor([head + [processor.image_token_id] * CELLS + tail])
    grid = torch.tensor([[1, GRID, GRID]])
    kinds = (prefix == processor.image_token_id).int()
    positions, _ = model.model.get_rope_index(prefix, image_grid_thw=grid, mm_token_type_ids=kinds)
    following = positions.max() + 1
    lengths = [SLOT] * QUESTIONS + [TRANSCRIPT]
    text = torch.cat([following + torch.arange(length) for length in lengths])
    owner = torch.cat([torch.zeros(prefix.shape[1]), *(torch.full((n,), i + 1.0) for i, n in enumerate(lengths))])
    everywhere = torch.cat([positions, text.expand(3, 1, -1)], -1)
    cos, sin = model.model.language_model.rotary_emb(torch.zeros(1, 1), everywhere)
    order = torch.arange(PATCHES).view(GRID // MERGE, MERGE, GRID // MERGE, MERGE).transpose(1, 2).reshape(-1)
    rows, columns = order // GRID, order % GRID
    vcos, vsin = model.model.visual.rotary_pos_emb(torch.zeros(1), torch.stack([rows, columns], -1))
    return {
        "prefix": prefix.to(device),
        "image_at": len(head),
        "cos": cos[0].to(device),
        "sin": sin[0].to(device),
        "vcos": vcos.to(device),
        "vsin": vsin.to(device),
        "order": order.to(device),
        "sight": sight(owner.to(device)),
        "eps": model.config.text_config.rms_norm_eps,
    }


def sight(owner: Tensor) -> Any:
    """Which places see which: the prefix (owner 0) is seen by all behind it, a slot by itself only, all causally.

    owner: [T] slot numbers. Returns a [T, T] mask, on a GPU a block mask for flex_attention.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((owner[key] == 0) | (owner[key] == owner[query]))

    total = len(owner)
    if owner.is_cuda:
        return create_block_mask(sees, None, None, total, total, device=owner.device, BLOCK_SIZE=64)
    place = torch.arange(total, device=owner.device)
    return sees(place, place, place[:, None], place[None, :])


def cut_patches(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> [B, PATCHES, 3 * 2 * PATCH * PATCH] in the image processor's order and scaling."""
    x = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    side = GRID // MERGE
    x = x.view(len(x), 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:])
    return x.reshape(len(images), PATCHES, -1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm in float32."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, heads, D] with tables [T, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def vision_block(x: Tensor, p: list[Tensor], vcos: Tensor, vsin: Tensor) -> Tensor:
    """One block of the tower over [B, PATCHES, C]."""
    n1w, n1b, n2w, n2b, qkv_w, qkv_b, o_w, o_b, f1w, f1b, f2w, f2b = p
    batch, count, width = x.shape
    heads = VISION["num_heads"]
    y = F.layer_norm(x.float(), (width,), n1w.float(), n1b.float(), 1e-6).to(x.dtype)
    q, k, v = F.linear(y, qkv_w, qkv_b).view(batch, count, 3, heads, -1).unbind(2)
    q, k = rotate(q.float(), vcos, vsin).to(x.dtype), rotate(k.float(), vcos, vsin).to(x.dtype)
    a = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + F.linear(a.transpose(1, 2).reshape(batch, count, width), o_w, o_b)
    y = F.layer_norm(x.float(), (width,), n2w.float(), n2b.float(), 1e-6).to(x.dtype)
    return x + F.linear(F.gelu(F.linear(y, f1w, f1b), approximate="tanh"), f2w, f2b)


VISION_NAMES = (
    "norm1.weight norm1.bias norm2.weight norm2.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
    "mlp.linear_fc1.weight mlp.linear_fc1.bias mlp.linear_fc2.weight mlp.linear_fc2.bias"
).split()


def merge(x: Tensor, p: Params, prefix: str, after: bool) -> Tensor:
    """The patch merger: [B, PATCHES, C] -> [B, CELLS, H]."""
    wide = x.shape[-1] * MERGE**2
    w, b = p[prefix + "norm.weight"], p[prefix + "norm.bias"]
    y = x.reshape(len(x), CELLS, wide) if after else x
    y = F.layer_norm(y.float(), (y.shape[-1],), w.float(), b.float(), 1e-6).to(x.dtype).reshape(len(x), CELLS, wide)
    y = F.gelu(F.linear(y, p[prefix + "linear_fc1.weight"], p[prefix + "linear_fc1.bias"]))
    return F.linear(y, p[prefix + "linear_fc2.weight"], p[prefix + "linear_fc2.bias"])


def tower(p: Params, images: Tensor, c: dict[str, Any], block: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures uint8 [B, S, S, 3] -> patches [B, PATCHES, C], cells [B, CELLS, H], deepstack cells [B, CELLS, H]."""
    root = "model.visual."
    weight = p[root + "patch_embed.proj.weight"]
    x = F.linear(cut_patches(images).to(weight.dtype), weight.flatten(1), p[root + "patch_embed.proj.bias"])
    x = x + p[root + "pos_embed.weight"][c["order"]]
    deep = None
    for i in range(VISION["depth"]):
        x = block(x, [p[f"{root}blocks.{i}.{n}"] for n in VISION_NAMES], c["vcos"], c["vsin"])
        if i == 3:
            deep = merge(x, p, root + "deepstack_merger_list.0.", after=True)
    assert deep is not None
    return x, merge(x, p, root + "merger.", after=False), deep


def attention(x: Tensor, p: list[Tensor], c: dict[str, Any]) -> Tensor:
    """Norm and attention of one decoder layer over [B, T, H], prefix first, then the slots."""
    norm, q_w, k_w, v_w, o_w, qn, kn = p
    batch, total, _ = x.shape
    y = rms(x, norm, c["eps"])
    q = rms(F.linear(y, q_w).view(batch, total, HEADS, HEAD_DIM), qn, c["eps"])
    k = rms(F.linear(y, k_w).view(batch, total, KV_HEADS, HEAD_DIM), kn, c["eps"])
    v = F.linear(y, v_w).view(batch, total, KV_HEADS, HEAD_DIM)
    q, k = (
        rotate(q, c["cos"].to(x.dtype), c["sin"].to(x.dtype)),
        rotate(k, c["cos"].to(x.dtype), c["sin"].to(x.dtype)),
    )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if isinstance(c["sight"], BlockMask):
        a = flex_attention(q, k, v, block_mask=c["sight"], enable_gqa=True)
    else:
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=c["sight"], enable_gqa=True)
    return x + F.linear(a.transpose(1, 2).flatten(2), o_w)


ATTENTION_NAMES = (
    "input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight "
    "self_attn.o_proj.weight self_attn.q_norm.weight self_attn.k_norm.weight"
).split()


def chosen(index: Tensor) -> Tensor:
    """One-hot expert ids [..., EXPERTS] (F.one_hot may ask the host)."""
    return index[..., None] == torch.arange(EXPERTS, device=index.device)


def route(y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router over rows [N, H]: weights [N, k], experts [N, k], and the load-balancing term (k when balanced)."""
    probs = F.softmax(F.linear(y, gate).float(), -1)
    top, index = torch.topk(probs, TOP_K, -1)
    top = top / top.sum(-1, keepdim=True)
    load = chosen(index).float().mean(0).sum(0)
    return top.to(y.dtype), index, EXPERTS * (load * probs.mean(0)).sum()


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Spread(torch.autograd.Function):
    """Rows [N, H] -> [N * k, H] in expert order; the way back is a gather too, so nothing is added atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order // TOP_K]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, TOP_K)).sum(1), None, None


class Permute(torch.autograd.Function):
    """Rows taken by a permutation whose inverse is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def experts_grouped(y: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, H] through their experts by grouped products over rows sorted by expert."""
    weights, index, balance = route(y, gate)
    flat = index.flatten()
    order = torch.argsort(flat)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=y.device))
    ends = chosen(flat).sum(0).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(Spread.apply(y, order, inverse), gate_up.transpose(1, 2), offs=ends)
    h = torch._grouped_mm(gated(h), down.transpose(1, 2), offs=ends)
    rows = Permute.apply(h, inverse, order).unflatten(0, (-1, TOP_K))
    return (rows * weights[..., None]).sum(1), balance


def experts_dense(y: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, H] through every expert, weighted by the router: no data-dependent shapes at eight times the work."""
    weights, index, balance = route(y, gate)
    full = torch.zeros(len(y), EXPERTS, dtype=y.dtype, device=y.device).scatter(1, index, weights)
    h = gated(F.linear(y, gate_up.flatten(0, 1)).unflatten(1, (EXPERTS, -1))) * full[..., None]
    return F.linear(h.flatten(1), down.transpose(0, 1).flatten(1)), balance


def decoder(
    p: Params,
    tokens: Tensor,
    cells: Tensor,
    deep: Tensor,
    c: dict[str, Any],
    attend: Callable[..., Tensor],
    feed_forward: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Slots [B, S] behind the pictures -> hidden states [B, S, H] of the slots, and the mean load-balancing term."""
    root = "model.language_model."
    batch, at = len(tokens), c["prefix"].shape[1]
    table = p[root + "embed_tokens.weight"]
    x = F.embedding(torch.cat([c["prefix"].expand(batch, -1), tokens], 1), table)
    first = c["image_at"]
    x = torch.cat([x[:, :first], cells, x[:, first + CELLS :]], 1)
    balance = torch.zeros((), device=x.device)
    for i in range(LAYERS):
        layer = f"{root}layers.{i}."
        x = attend(x, [p[layer + n] for n in ATTENTION_NAMES], c)
        y = rms(x, p[layer + "post_attention_layernorm.weight"], c["eps"])
        if layer + "mlp.gate.weight" in p:
            names = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
            out, term = feed_forward(y.flatten(0, 1), *(p[layer + n] for n in names))
            x, balance = x + out.view_as(x), balance + term / LAYERS
        else:
            gate, up, down = (p[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
        if i == 0:
            x = torch.cat([x[:, :first], x[:, first : first + CELLS] + deep, x[:, first + CELLS :]], 1)
    return rms(x[:, at:], p[root + "norm.weight"], c["eps"]), balance
