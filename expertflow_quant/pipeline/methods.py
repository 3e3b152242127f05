"""One layer's experts by one method: weights and rows in, records with their measured errors out.

rtn needs no rows. awq searches every expert on at most ``max_rows`` of its rows. gptq takes all rows into
the Hessians, down's from what the quantized gate_up hands on, and works on several experts at once, as many
as fit ``GPTQ_BYTES``. An expert whose format is bf16 is stored as it is, whatever the method.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.checkpoint.manifest import ExpertEntry
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.kernels import ExpertWeights, expert_product, expert_weights
from expertflow_quant.pipeline.observe import ExpertRows
from expertflow_quant.quantize import (
    QuantizedMatrix,
    ScaleRule,
    accumulate_hessian,
    expert_fields,
    quantize_gptq,
    quantize_rtn,
    search_awq,
)

METHODS = ("awq", "gptq", "rtn")
GPTQ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MethodOptions:
    """``scales``: how a group's range is found ("absmax", or "mse" searched). ``max_rows``: rows of an
    expert on which AWQ searches and errors are measured. ``grid``: steps of AWQ's search. ``damp``,
    ``act_order``: GPTQ's.

    GPTQ's defaults were chosen on held-out questions of the shipped model. Its output error on answer tokens
    fell from 6.1 % (columns in order, dampening 0.01 as published) to 5.4 % (largest first) and 4.8 % (0.05)
    in int4, from 34 to 25 and 24 % in int2, while calibration tokens alone preferred 0.01.
    """

    scales: ScaleRule = "absmax"
    max_rows: int = 512
    grid: int = 20
    damp: float = 0.05
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.scales not in get_args(ScaleRule):
            raise ExpertFlowError(f"scales {self.scales!r} is not known: use one of {', '.join(get_args(ScaleRule))}")
        if self.max_rows < 1 or self.grid < 1 or not self.damp > 0:
            raise ExpertFlowError(
                f"max_rows {self.max_rows} and grid {self.grid} must be at least 1 and damp {self.damp} above 0"
            )

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """One expert to be quantized: its number, format, float32 weights and rows (None without calibration)."""

    expert: int
    format: Format
    weights: ExpertWeights
    rows: ExpertRows | None


@dataclass(frozen=True)
class _Parts:
    """An expert's quantized parts, as ``expert_fields`` takes them."""

    gate_up: QuantizedMatrix | Tensor
    down: QuantizedMatrix | Tensor
    input_scale: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class LayerQuantizer:
    """Quantizes the experts of one layer. ``shape`` and ``gate`` are the layer's; raises ExpertFlowError for
    an unknown method or when a method that needs rows gets none."""

    def __init__(self, method: str, shape: Any, gate: Gate, options: MethodOptions) -> None:
        check_method(method)
        self._method, self._shape, self._gate, self._options = method, shape, gate, options

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[int, ExpertEntry, Tensor]]:
        """(expert, entry, record) for every job, in any order."""
        if self._method == "gptq":
            yield from self._run_gptq(jobs)
            return
        for job in jobs:
            yield self._finish(job, self._awq(job) if self._uses_awq(job) else self._plain(job))

    def _uses_awq(self, job: Job) -> bool:
        return self._method == "awq" and job.format.is_int

    def _plain(self, job: Job) -> _Parts:
        weights = job.weights
        if not job.format.is_int:
            return _Parts(weights.gate_up, weights.down, None, weights.gate_up_bias, weights.down_bias)
        up, down = (
            quantize_rtn(matrix, job.format, scales=self._options.scales) for matrix in (weights.gate_up, weights.down)
        )
        return _Parts(up, down, None, weights.gate_up_bias, weights.down_bias)

    def _awq(self, job: Job) -> _Parts:
        weights, rows = job.weights, _rows_of(job, "awq").thinned(self._options.max_rows)
        found = search_awq(
            weights.gate_up,
            weights.down,
            self._gate,
            rows.inputs.float(),
            rows.weights,
            job.format,
            self._options.grid,
            gate_up_bias=weights.gate_up_bias,
            down_bias=weights.down_bias,
            scales=self._options.scales,
        )
        return _Parts(found.gate_up, found.down, found.input_scale, found.gate_up_bias, weights.down_bias)

    def _run_gptq(self, jobs: Iterator[Job]) -> Iterator[tuple[int, ExpertEntry, Tensor]]:
        waiting: dict[Format, list[Job]] = {}
        for job in jobs:
            if not job.format.is_int:
                yield self._finish(job, self._plain(job))
                continue
            batch = waiting.setdefault(job.format, [])
            batch.append(job)
            if len(batch) >= self._gptq_batch(job.weights.down.device.type):
                yield from self._gptq(waiting.pop(job.format))
        for batch in waiting.values():
            yield from self._gptq(batch)

    def _gptq_batch(self, device: str) -> int:
        widest = max(in_features for _, in_features in self._shape.matrices.values())
        return max(1, GPTQ_BYTES.get(device, 0) // (4 * 8 * widest**2))  # a Hessian and its float64 factors

    def _gptq(self, batch: Sequence[Job]) -> Iterator[tuple[int, ExpertEntry, Tensor]]:
        rows = [_rows_of(job, "gptq") for job in batch]
        inputs = [each.inputs.float() for each in rows]
        ups = self._gptq_matrices(batch, "gate_up", inputs, rows)
        inner = [
            self._gate(functional.linear(x, up.dequantize(), job.weights.gate_up_bias))
            for x, up, job in zip(inputs, ups, batch, strict=True)
        ]
        downs = self._gptq_matrices(batch, "down", inner, rows)
        for job, up, down in zip(batch, ups, downs, strict=True):
            yield self._finish(job, _Parts(up, down, None, job.weights.gate_up_bias, job.weights.down_bias))

    def _gptq_matrices(
        self, batch: Sequence[Job], name: str, inputs: Sequence[Tensor], rows: Sequence[ExpertRows]
    ) -> list[QuantizedMatrix]:
        hessians = [accumulate_hessian(x, each.weights) for x, each in zip(inputs, rows, strict=True)]
        found = quantize_gptq(
            torch.stack([getattr(job.weights, name) for job in batch]),
            torch.stack(hessians),
            batch[0].format,
            self._options.damp,
            act_order=self._options.act_order,
            scales=self._options.scales,
        )
        return found if isinstance(found, list) else [found]

    def _finish(self, job: Job, parts: _Parts) -> tuple[int, ExpertEntry, Tensor]:
        layout = RecordLayout(self._shape, job.format, parts.input_scale is not None)
        made = expert_fields(layout, **{part.name: getattr(parts, part.name) for part in fields(parts)})
        record = layout.pack(made)
        runs = expert_weights(layout.views(record), layout, torch.float32)
        rows = job.rows
        has_rows = rows is not None and len(rows.weights) > 0
        error = self._output_error(job, runs) if has_rows else _weight_error(job.weights, runs)
        tokens, coverage = (rows.tokens, rows.coverage) if rows is not None else (0, "none")
        return (
            job.expert,
            ExpertEntry(job.format, layout.input_scale, layout.nbytes, tokens, coverage, float(f"{error:.6g}")),
            record,
        )

    def _output_error(self, job: Job, runs: ExpertWeights) -> float:
        """Of the record as it will run, over its rows, each weighed: ``|w (y_q - y)| / |w y|``."""
        rows = _rows_of(job, self._method).thinned(self._options.max_rows)
        x, weight = rows.inputs.float(), rows.weights.unsqueeze(-1)
        wanted = expert_product(x, job.weights, self._gate) * weight
        got = expert_product(x, _moved(runs, x), self._gate) * weight
        return _relative((got - wanted).norm(), wanted.norm())


def check_method(method: str) -> None:
    """Raises ExpertFlowError for a method that there is not."""
    if method not in METHODS:
        raise ExpertFlowError(f"method {method!r} is not known: use one of {', '.join(METHODS)}")


def _rows_of(job: Job, method: str) -> ExpertRows:
    if job.rows is None:
        raise ExpertFlowError(f"{method} needs calibration samples: give samples or use rtn")
    return job.rows


def _weight_error(weights: ExpertWeights, runs: ExpertWeights) -> float:
    runs = _moved(runs, weights.gate_up)
    up = runs.gate_up if runs.input_scale is None else runs.gate_up * runs.input_scale
    change = (up - weights.gate_up).square().sum() + (runs.down - weights.down).square().sum()
    return _relative(change.sqrt(), (weights.gate_up.square().sum() + weights.down.square().sum()).sqrt())


def _relative(change: Tensor, whole: Tensor) -> float:
    return float(change / whole) if float(whole) > 0 else float(change)


def _moved(weights: ExpertWeights, like: Tensor) -> ExpertWeights:
    parts = {part.name: getattr(weights, part.name) for part in fields(weights)}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.to(like.device) for name, tensor in parts.items()}
    return ExpertWeights(**moved)
