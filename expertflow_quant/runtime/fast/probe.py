"""What a model asks of the fast path, found by letting it run: two tokens and one step through every layer, answered
with zeros.

So nothing here knows architectures: a model that reaches into a cache, wants masks of its own or an attention that
is not there fails in this pass, and its error says why it takes the plain path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import Gate
from expertflow_quant.models.seams import cache_argument
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.fast.attention import NAME, PassThrough
from expertflow_quant.runtime.fast.kv import KVShape

TOKENS = 2
MAX_HEAD = 256
SILU = ("SiLU", "SiLUActivation")
READ_BY_HOST = frozenset(
    {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default}
)


class FastPathError(ExpertFlowError):
    """This model cannot take the fast path; the message says what it asks for."""


@dataclass(frozen=True)
class Findings:
    """``kv``: attention layers' keys and values by layer index; ``gates``: each MoE layer's gate, in model order;
    ``position_axes``: leading dimensions of position ids (0: they are ``[rows, tokens]``)."""

    kv: Mapping[int, KVShape]
    gates: tuple[Gate, ...]
    position_axes: int


@dataclass
class _Probe:
    kv: dict[int, KVShape] = field(default_factory=dict)
    gates: dict[int, Gate] = field(default_factory=dict)
    windows: set[int] = field(default_factory=set)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: passes.AttentionOptions) -> Tensor:
        if layer in self.kv or k.shape[-1] != v.shape[-1] or k.shape[-1] > MAX_HEAD:
            raise FastPathError(
                f"layer {layer} has heads of {k.shape[-1]} for keys and {v.shape[-1]} for values"
                + (" and attends twice" if layer in self.kv else "")
                + f": the fast path takes one size of up to {MAX_HEAD} and one attention a layer"
            )
        if options.window:
            self.windows.add(options.window)
        self.kv[layer] = KVShape(k.shape[1], k.shape[-1], v.shape[-1])
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    def experts(self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.gates[layer] = gate_of(module)
        return torch.zeros_like(hidden)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation whose result the host reads: a captured step would be frozen at what it read."""

    found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READ_BY_HOST and self.found is None:
            self.found = str(func)
        return func(*args, **(kwargs or {}))


def gate_of(module: Any) -> Gate:
    """The gate of an experts module, by its flags: fused where it is transformers' own with SiLU."""
    if not module.has_gate:
        return Gate(module.act_fn)
    own = getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate"
    plain = not own and module.is_concatenated and type(module.act_fn).__name__ in SILU
    return Gate(module._apply_gate, "silu" if plain else None)


def use_our_attention(model: Any) -> None:
    """Let the language model's layers call our attention; a vision tower keeps its own."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        model.set_attn_implementation(NAME)
    else:
        key = next(key for key in model.config.sub_configs if getattr(model.config, key, None) is text)
        model.set_attn_implementation({key: NAME})
    if text._attn_implementation != NAME:
        raise FastPathError(f"{type(model).__name__} does not let its attention be chosen")


def positions_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids of a prompt, ``[rows, tokens]`` or ``[axes, rows, tokens]``, as transformers' generate has them."""
    found: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    rows = inputs["input_ids"].shape[0]
    return found.expand(rows, -1) if found.ndim == 2 and found.shape[0] != rows else found


def probe(model: Any, device: torch.device) -> Findings:
    """Run ``model``, whose attention is ours already, over a prompt and a step. Raises FastPathError naming what does
    not fit."""
    seen = _Probe()
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with passes.running(seen):
            positions = positions_of(model, inputs)
            model(**inputs, position_ids=positions, **{cache_argument(model): PassThrough()}, use_cache=True)
            _refuse_waits(model, ids[:, -1:], positions[..., -1:] + 1)
    except FastPathError:
        raise
    except Exception as error:
        raise FastPathError(f"{type(model).__name__} does not run on the fast path: {error}") from error
    if not seen.kv or not seen.gates or sorted(seen.gates) != list(range(len(seen.gates))):
        raise FastPathError(f"{type(model).__name__} has no attention or no experts that the fast path could run")
    if (hidden := _only_in_masks(model.config.get_text_config(decoder=True), seen.windows)) is not None:
        raise FastPathError(f"{type(model).__name__} tells attention by a mask alone of {hidden}, and no mask is made")
    gates = tuple(seen.gates[layer] for layer in range(len(seen.gates)))
    return Findings(seen.kv, gates, positions.shape[0] if positions.ndim == 3 else 0)


def _refuse_waits(model: Any, ids: Tensor, positions: Tensor) -> None:
    with passes.running(_Probe()), _Waits() as waits:  # type: ignore[no-untyped-call]
        model(input_ids=ids, position_ids=positions, **{cache_argument(model): PassThrough()}, use_cache=True)
    if waits.found is not None:
        raise FastPathError(
            f"{type(model).__name__} reads what the device has computed ({waits.found}) to decide how a step goes on, "
            "as rotary frequencies do that change with a text's length: a captured step decides nothing"
        )


def _only_in_masks(text: Any, windows: set[int]) -> str | None:
    """What the config says of who sees whom that no attention module was heard to ask for: as it would be lost."""
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window and window not in windows and (kinds is None or "sliding_attention" in kinds):
        return f"a window of {window} tokens"
    if "chunked_attention" in (kinds or ()):
        return "chunks of tokens"
    if getattr(text, "use_bidirectional_attention", None) or not getattr(text, "is_causal", True):
        return "tokens that see later ones"
    return None
