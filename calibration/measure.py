"""What each expert loses in each format, measured at its output on calibration data: needs one layer in memory, and
knows nothing of what the layers after it make of the loss (``sensitivity`` does).

The damage of a format to an expert is ``sum_t w_t^2 |y_q(x_t) - y(x_t)|^2`` over the tokens t routed to it,
as a share of ``sum_t w_t^2 |y(x_t)|^2`` over all experts of its layer; ``w_t`` is the router's weight times
the modality's. y_q has the expert's weights rounded to nearest, which needs no search: a better quantizer
shrinks all damages and mostly keeps their order. Adding damages of experts and layers neglects how they
interact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.plan import ExpertErrors
from expertflow_quant.formats import Format
from expertflow_quant.kernels import ExpertWeights, expert_product
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations, ObservedLayer, in_dtype
from expertflow_quant.pipeline.stream import ModelStream
from expertflow_quant.quantize import ScaleRule, quantize_rtn

Progress = Callable[[int, int], None]


def measure_errors(
    model: Path,
    samples: Sequence[dict[str, Any]],
    formats: Sequence[Format],
    progress: Progress,
    scales: ScaleRule = "absmax",
) -> list[ExpertErrors]:
    """The damage of every format in ``formats`` to every expert of ``model``, one layer in memory at a time.

    ``samples``: conversations ``{"messages": [...]}``. ``progress`` gets (layers done, layers). ``scales``:
    how a group's range is found, as in rounding. Raises ExpertFlowError for a model or samples that cannot
    be read.
    """
    stream = ModelStream(model)
    data = CalibrationData.from_samples(load_processor(model), samples)
    measured: list[ExpertErrors] = []
    with torch.no_grad():
        for layer in Observations(stream, data).layers():
            measured += _layer_errors(stream, layer, formats, scales)
            progress(layer.layer.index + 1, len(stream.layers))
    stream.close()
    return measured


def _layer_errors(
    stream: ModelStream, layer: ObservedLayer, formats: Sequence[Format], scales: ScaleRule
) -> Iterator[ExpertErrors]:
    """Damages of one layer's experts; the layer's energy is known once all of them have been run."""
    gate, energy, found = stream.gate(layer.layer.index), 0.0, []
    for index in range(layer.layer.experts):
        rows = layer.rows(index)
        inputs, weights = rows.inputs[: rows.tokens], rows.weights[: rows.tokens]  # no closest tokens
        expert = in_dtype(stream.expert(layer.layer.index, index), inputs)
        exact = expert_product(inputs, expert, gate)
        energy += _energy(exact, weights)
        damage = {
            form: _energy(expert_product(inputs, _rounded(expert, form, scales), gate) - exact, weights)
            for form in formats
        }
        size = expert.gate_up.numel() + expert.down.numel()
        found.append(ExpertErrors(layer.layer.index, index, size, rows.tokens, damage))
    for errors in found:
        yield replace(errors, damage={form: lost / (energy or 1.0) for form, lost in errors.damage.items()})


def _rounded(expert: ExpertWeights, form: Format, scales: ScaleRule) -> ExpertWeights:
    """The expert with both matrices rounded to ``form`` and decoded again; biases as they are."""
    if not form.has_codes:
        return expert
    matrices = {
        name: quantize_rtn(getattr(expert, name), form, scales=scales).dequantize(expert.gate_up.dtype)
        for name in ("gate_up", "down")
    }
    return replace(expert, **matrices)


def _energy(outputs: Tensor, weights: Tensor) -> float:
    """``sum_t w_t^2 |y_t|^2`` of outputs ``[N, H]`` and weights ``[N]``."""
    return float((outputs.double().square().sum(1) * weights.double().square()).sum())
