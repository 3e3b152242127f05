"""One layer's experts by one method: weights and rows in, records with their measured errors out.

rtn needs no rows. awq searches every expert on at most ``max_rows`` of its rows. gptq takes all rows into
the Hessians, down's from what the quantized gate_up hands on. An expert whose format is bf16 is stored as it
is, whatever the method.

Experts of one format go through together, in batches that fit ``BATCH_BYTES``: on a GPU one after the other,
on the CPU side by side, each batch on one thread. What is in a batch depends on the layer alone, never on
threads or free memory, so neither do the bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.checkpoint.manifest import ExpertEntry
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape, RecordLayout
from expertflow_quant.formats.spec import Format
from expertflow_quant.kernels import ExpertWeights, expert_product, expert_weights
from expertflow_quant.pipeline.observe import ExpertRows
from expertflow_quant.pipeline.parallel import side_by_side
from expertflow_quant.quantize import (
    QuantizedMatrix,
    ScaleRangeError,
    ScaleRule,
    accumulate_hessian,
    expert_fields,
    quantize_gptq,
    quantize_rtn,
    search_awq_batch,
)

METHODS = ("awq", "gptq", "rtn")
BATCH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
BATCH_EXPERTS = {"cpu": 4}
"""On the CPU no more than so many in a batch, however small they are: batches are what its threads share."""
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
    """Quantizes the experts of one layer. ``shape`` and ``gate`` are the layer's, ``batch`` how many experts go
    together if not as many as fit; raises ExpertFlowError for an unknown method or when a method that needs
    rows gets none."""

    def __init__(
        self, method: str, shape: ExpertShape, gate: Gate, options: MethodOptions, batch: int | None = None
    ) -> None:
        check_method(method)
        self._method, self._shape, self._gate, self._options, self._batch = method, shape, gate, options, batch

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[int, ExpertEntry, Tensor]]:
        """(expert, entry, record) for every job, in any order."""
        for made in side_by_side(self._batches(jobs), self._make, lambda batch: _device(batch[0]).type == "cpu"):
            yield from made

    def _batches(self, jobs: Iterator[Job]) -> Iterator[list[Job]]:
        waiting: dict[Format, list[Job]] = {}
        for job in jobs:
            batch = waiting.setdefault(job.format, [])
            batch.append(job)
            if len(batch) >= (self._batch or batch_size(self._shape, _device(job))):
                yield waiting.pop(job.format)
        yield from waiting.values()

    def _make(self, batch: Sequence[Job]) -> list[tuple[int, ExpertEntry, Tensor]]:
        method = self._method if batch[0].format.has_codes else "rtn"
        make = {"awq": self._awq, "gptq": self._gptq, "rtn": self._plain}[method]
        return [self._finish(job, parts) for job, parts in zip(batch, make(batch), strict=True)]

    def _plain(self, batch: Sequence[Job]) -> Iterator[_Parts]:
        for job in batch:
            up, down = self._rounded(job, "gate_up"), self._rounded(job, "down")
            yield _Parts(up, down, None, job.weights.gate_up_bias, job.weights.down_bias)

    def _rounded(self, job: Job, name: str) -> QuantizedMatrix | Tensor:
        matrix: Tensor = getattr(job.weights, name)
        if not job.format.has_codes:
            return matrix
        with _expert_named([job], name):
            return quantize_rtn(matrix, job.format, scales=self._options.scales)

    def _awq(self, batch: Sequence[Job]) -> Iterator[_Parts]:
        weights = [job.weights for job in batch]
        rows = [_rows_of(job, "awq").thinned(self._options.max_rows) for job in batch]
        with _expert_named(batch):
            found = search_awq_batch(
                [each.gate_up for each in weights],
                [each.down for each in weights],
                self._gate,
                [each.inputs for each in rows],
                [each.weights for each in rows],
                batch[0].format,
                self._options.grid,
                gate_up_bias=_biases([each.gate_up_bias for each in weights]),
                down_bias=_biases([each.down_bias for each in weights]),
                scales=self._options.scales,
            )
        for each, own in zip(found, weights, strict=True):
            yield _Parts(each.gate_up, each.down, each.input_scale, each.gate_up_bias, own.down_bias)

    def _gptq(self, batch: Sequence[Job]) -> Iterator[_Parts]:
        rows = [_rows_of(job, "gptq") for job in batch]
        ups = self._gptq_matrices(batch, "gate_up", [accumulate_hessian(each.inputs, each.weights) for each in rows])
        hessians = [
            accumulate_hessian(
                self._gate(functional.linear(each.inputs.float(), up.dequantize(), job.weights.gate_up_bias)),
                each.weights,
            )
            for each, up, job in zip(rows, ups, batch, strict=True)
        ]
        downs = self._gptq_matrices(batch, "down", hessians)
        for job, up, down in zip(batch, ups, downs, strict=True):
            yield _Parts(up, down, None, job.weights.gate_up_bias, job.weights.down_bias)

    def _gptq_matrices(self, batch: Sequence[Job], name: str, hessians: Sequence[Tensor]) -> list[QuantizedMatrix]:
        with _expert_named(batch, name):
            found = quantize_gptq(
                torch.stack([getattr(job.weights, name) for job in batch]),
                torch.stack(list(hessians)),
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
        runs = expert_weights(layout.views(record.to(_device(job))), layout, torch.float32)
        rows = job.rows
        has_rows = rows is not None and len(rows.weights) > 0
        error = self._output_error(job, runs) if has_rows else _weight_error(job.weights, runs)
        entry = ExpertEntry(job.format, layout.input_scale, layout.nbytes, error=float(f"{error:.6g}"))
        if rows is not None:
            entry = replace(entry, tokens=rows.tokens, coverage=rows.coverage, text_tokens=rows.text_tokens)
        return job.expert, entry, record

    def _output_error(self, job: Job, runs: ExpertWeights) -> float:
        """Of the record as it will run, over its rows, each weighed: ``|w (y_q - y)| / |w y|``."""
        rows = _rows_of(job, self._method).thinned(self._options.max_rows)
        x, weight = rows.inputs.float(), rows.weights.unsqueeze(-1)
        wanted = expert_product(x, job.weights, self._gate) * weight
        got = expert_product(x, runs, self._gate) * weight
        return _relative((got - wanted).norm(), wanted.norm())


def batch_size(shape: ExpertShape, device: torch.device) -> int:
    """How many experts of a layer go together: as many as fit, by what the larger of both methods takes for one
    (GPTQ four float64 matrices of the widest input, AWQ eight float32 copies of the weights)."""
    widest = max(in_features for _, in_features in shape.matrices.values())
    weights = sum(rows * columns for rows, columns in shape.matrices.values())
    fitting = BATCH_BYTES.get(device.type, BATCH_BYTES["cpu"]) // max(4 * 8 * widest**2, 8 * 4 * weights)
    return max(1, min(fitting, BATCH_EXPERTS.get(device.type, fitting)))


def check_method(method: str) -> None:
    """Raises ExpertFlowError for a method that there is not."""
    if method not in METHODS:
        raise ExpertFlowError(f"method {method!r} is not known: use one of {', '.join(METHODS)}")


def check_formats(method: str, formats: Iterable[Format]) -> None:
    """Raises ExpertFlowError for a format that the method cannot make."""
    for format in formats:
        if method == "gptq" and format.has_codes and not format.is_int:
            raise ExpertFlowError(f"gptq makes integer codes, not {format.name}: use awq or rtn, or an integer format")


@contextmanager
def _expert_named(batch: Sequence[Job], *matrix: str) -> Iterator[None]:
    try:
        yield
    except ScaleRangeError as error:
        raise error.at(": ".join((f"expert {batch[error.matrix].expert}", *matrix))) from None


def _rows_of(job: Job, method: str) -> ExpertRows:
    if job.rows is None:
        raise ExpertFlowError(f"{method} needs calibration samples: give samples or use rtn")
    return job.rows


def _weight_error(weights: ExpertWeights, runs: ExpertWeights) -> float:
    up = runs.gate_up if runs.input_scale is None else runs.gate_up * runs.input_scale
    change = (up - weights.gate_up).square().sum() + (runs.down - weights.down).square().sum()
    return _relative(change.sqrt(), (weights.gate_up.square().sum() + weights.down.square().sum()).sqrt())


def _relative(change: Tensor, whole: Tensor) -> float:
    return float(change / whole) if float(whole) > 0 else float(change)


def _device(job: Job) -> torch.device:
    return job.weights.down.device


def _biases(biases: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The experts' biases, None where they have none (all or none of a layer have)."""
    given = [bias for bias in biases if bias is not None]
    return given or None
