"""AWQ (Lin, Tang, Tang, Yang, Dang, Han 2023, arXiv 2306.00978) for the experts of a mixture.

Input channels with large activations matter most: their weights are multiplied by ``s > 1`` before rounding
and the activation divided by it, which shrinks the error where it counts. ``s = mean|x| ^ ratio``, normalised
by ``sqrt(max(s) * min(s))``; the ratio is found on a grid over [0, 1], then each group's range is clipped
where that lowers its output error (clip search as in the published code: shrinking to no less than half in
steps of 1/20).

Where this goes beyond the paper, since an expert is alone behind a norm that all experts share:
- gate_up's scale is kept with the expert and multiplies the activation (``input_scale = 1 / s``, rounded to
  fp16, as stored, before anything is measured). down's is folded into up's rows, where the gate allows it.
- Means and errors are weighted by the router's affinity: token t's output counts ``weights[t] ^ 2``.
- The error is that of the whole expert as it will run, both matrices rounded. A step is taken only if it
  lowers that error and the first is plain rounding: on the data it was given the result is never worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.quantize.awq_search import Found, Search
from expertflow_quant.quantize.folding import Gate, scalable_rows
from expertflow_quant.quantize.grid import ScaleRule, require_finite
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.rtn import require_codes


@dataclass(frozen=True)
class AWQResult:
    """One expert after the search: ``down @ gate(gate_up @ (x * input_scale) + gate_up_bias) + down_bias``.

    ``ratio`` and ``down_ratio`` are the grid's choices (0: unscaled), ``clipped`` names the matrices whose
    clipping was kept, ``tokens`` counts what was seen. ``error`` is the expert's relative output error (root
    of the affinity-weighted squared error over the squared output), ``rounding_error`` that of plain
    rounding.
    """

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    input_scale: Tensor  # fp16 [H]
    gate_up_bias: Tensor | None  # float32 [2I or I], its up rows scaled like the weights
    ratio: float
    down_ratio: float
    clipped: tuple[str, ...]
    tokens: int
    error: float
    rounding_error: float


def search_awq(
    gate_up: Tensor,
    down: Tensor,
    gate: Gate,
    inputs: Tensor,
    weights: Tensor,
    format: Format,
    grid: int = 20,
    *,
    fold: bool = True,
    clip: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: ScaleRule = "absmax",
) -> AWQResult:
    """Quantize one expert by its ``inputs [T, H]`` and their router affinities ``weights [T]``.

    gate_up is ``[2I or I, H]``, down ``[H, I]``; ``gate`` maps float32 ``[T, 2I or I]`` to ``[T, I]``. The
    grid has ``grid + 1`` ratios, 0 and 1 included. ``fold=False`` leaves down's input unscaled, as it always
    is when the gate is not linear in up. No tokens give plain rounding and ``tokens == 0``. Raises
    ExpertFlowError for NaN or infinity, shapes that do not match, bf16.
    """
    return search_awq_batch(
        [gate_up],
        [down],
        gate,
        [inputs],
        [weights],
        format,
        grid,
        fold=fold,
        clip=clip,
        gate_up_bias=None if gate_up_bias is None else [gate_up_bias],
        down_bias=None if down_bias is None else [down_bias],
        scales=scales,
    )[0]


@torch.no_grad()
def search_awq_batch(
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate: Gate,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    format: Format,
    grid: int = 20,
    *,
    fold: bool = True,
    clip: bool = True,
    gate_up_bias: Sequence[Tensor] | None = None,
    down_bias: Sequence[Tensor] | None = None,
    scales: ScaleRule = "absmax",
) -> list[AWQResult]:
    """``search_awq`` for several experts of one shape, each with rows of its own, all trials in common.

    Every expert's result is its own, up to the order of sums: the rows of those that have fewer are filled up with
    zeros. On the host nothing is decided, and little is waited for.
    """
    require_codes(format, "AWQ")
    for parts in zip(gate_up, down, inputs, weights, strict=True):
        _check(*parts, grid)
    first = down[0]
    rows = scalable_rows(gate, gate_up[0].shape[0], first.shape[1], first.device) if fold else None
    search = Search(
        gate_up=torch.stack([_plain("gate_up", each) for each in gate_up]),
        down=torch.stack([_plain("down", each) for each in down]),
        inputs=pad_sequence([_plain("inputs", each) for each in inputs], batch_first=True),
        weights=pad_sequence([_plain("weights", each) for each in weights], batch_first=True),
        gate=gate,
        format=format,
        scales=scales,
        rows=rows,
        gate_up_bias=_plain_biases("gate_up_bias", gate_up_bias),
        down_bias=_plain_biases("down_bias", down_bias),
    )
    return _results(search.run(grid, clip), [len(each) for each in weights])


def _results(found: Found, tokens: Sequence[int]) -> list[AWQResult]:
    ups, downs = found.gate_up.matrices(), found.down.matrices()
    ratios, down_ratios = found.ratio.tolist(), found.down_ratio.tolist()
    clipped = {name: chosen.tolist() for name, chosen in found.clipped.items()}
    size = torch.where(found.size > 0, found.size, 1.0)
    errors, rounding = ((each / size).sqrt().tolist() for each in (found.error, found.rounding_error))
    return [
        AWQResult(
            gate_up=ups[expert],
            down=downs[expert],
            input_scale=found.input_scale[expert].clone(),
            gate_up_bias=None if found.gate_up_bias is None else found.gate_up_bias[expert].clone(),
            ratio=ratios[expert],
            down_ratio=down_ratios[expert],
            clipped=tuple(name for name, chosen in clipped.items() if chosen[expert]),
            tokens=count,
            error=errors[expert],
            rounding_error=rounding[expert],
        )
        for expert, count in enumerate(tokens)
    ]


def _plain(name: str, tensor: Tensor) -> Tensor:
    require_finite(**{name: tensor})
    return tensor.to(torch.float32).contiguous()


def _plain_biases(name: str, biases: Sequence[Tensor] | None) -> Tensor | None:
    return None if biases is None else torch.stack([_plain(name, each) for each in biases])


def _check(gate_up: Tensor, down: Tensor, inputs: Tensor, weights: Tensor, grid: int) -> None:
    hidden, intermediate = down.shape
    if gate_up.shape not in ((2 * intermediate, hidden), (intermediate, hidden)):
        raise ExpertFlowError(
            f"gate_up {tuple(gate_up.shape)} does not belong to down {tuple(down.shape)}: pass [2I or I, H] and [H, I]"
        )
    if inputs.ndim != 2 or inputs.shape[1] != hidden or weights.shape != inputs.shape[:1]:
        raise ExpertFlowError(
            f"inputs {tuple(inputs.shape)} with weights {tuple(weights.shape)}: pass [tokens, {hidden}] and [tokens]"
        )
    if grid < 1:
        raise ExpertFlowError(f"a grid of {grid} steps must have at least 1 (20 is usual)")
