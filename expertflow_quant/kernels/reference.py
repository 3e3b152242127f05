"""The plain PyTorch twins: what every faster kernel must equal. Any device.

Weights are decoded in float32 and rounded once to the dtype asked for: ``W = (code - zero) * scale``, or
``NF4_VALUES[code] * scale``. An input scale multiplies the activation, not the weights: ``y = W @ (x * input_scale)``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import ExpertFlowError, Format, RecordLayout
from expertflow_quant.kernels.lookup import decode


@dataclass(frozen=True)
class ExpertWeights:
    """One expert ready to multiply: gate_up ``[2I or I, H]``, down ``[H, I]``, biases ``[2I or I]`` and
    ``[H]`` in the compute dtype, input_scale float32 ``[H]``; None for what the record does not hold."""

    gate_up: Tensor
    down: Tensor
    input_scale: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def expert_weights(views: Mapping[str, Tensor], layout: RecordLayout, dtype: torch.dtype) -> ExpertWeights:
    """Decode the fields of one record (``layout.views(record)``) to floating ``dtype`` on their device."""
    matrices = {
        name: _matrix(views, name, layout.format, in_features, dtype)
        for name, (_, in_features) in layout.shape.matrices.items()
    }
    return ExpertWeights(
        matrices["gate_up"],
        matrices["down"],
        input_scale=views["gate_up.input_scale"].float() if layout.input_scale else None,
        gate_up_bias=views["gate_up.bias"].to(dtype) if layout.shape.has_bias else None,
        down_bias=views["down.bias"].to(dtype) if layout.shape.has_bias else None,
    )


def expert_product(hidden: Tensor, weights: ExpertWeights, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """One expert applied to ``hidden [n, H]`` (the weights' dtype) -> ``[n, H]``.

    ``gate`` maps ``[n, 2I]`` to ``[n, I]`` (the module's own ``_apply_gate``), or is the activation when
    there is no gate. Raises ExpertFlowError when hidden and weights differ in dtype.
    """
    if hidden.dtype != weights.gate_up.dtype:
        raise ExpertFlowError(
            f"hidden states are {hidden.dtype} but the weights were decoded to {weights.gate_up.dtype}: "
            "decode with expert_weights(views, layout, hidden.dtype)"
        )
    if weights.input_scale is not None:
        hidden = (hidden * weights.input_scale).to(hidden.dtype)
    inner = gate(functional.linear(hidden, weights.gate_up, weights.gate_up_bias))
    return functional.linear(inner, weights.down, weights.down_bias)


def _matrix(views: Mapping[str, Tensor], name: str, format: Format, in_features: int, dtype: torch.dtype) -> Tensor:
    if not format.has_codes:
        return views[f"{name}.weight"].to(dtype)
    return dequantize(views[f"{name}.codes"], views[f"{name}.scales"], views.get(f"{name}.zeros"), format, dtype)


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, format: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Packed codes uint8 ``[O, I * bits / 8]``, scales fp16 ``[O, G]`` and zeros uint8 ``[O, G]`` (None when
    symmetric) to weights ``[O, I]``: computed in float32, rounded once to ``dtype``."""
    in_features = packed.shape[1] * 8 // format.bits
    weight = decode(packed, format, in_features)
    grouped = weight.view(*scales.shape, -1)
    if zeros is not None:
        grouped.sub_(zeros.to(torch.float32).unsqueeze(-1))
    grouped.mul_(scales.to(torch.float32).unsqueeze(-1))
    return weight.to(dtype)
