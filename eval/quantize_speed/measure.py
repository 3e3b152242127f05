"""Times of one layer, batched and one by one, and what batches give against single experts on the CPU."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.quantize_speed.layer import RandomLayer, silu_gate
from expertflow_quant.formats import Format, RecordLayout, unpack_codes
from expertflow_quant.pipeline.methods import LayerQuantizer, MethodOptions, batch_size

ERROR_TOLERANCE = 0.01
"""A batched expert's output error may differ so much from that of the same expert alone on the CPU."""


@dataclass(frozen=True)
class Expert:
    """One quantized expert: its output error, its record and how that is laid out."""

    error: float
    record: Tensor
    layout: RecordLayout


@dataclass(frozen=True)
class Bench:
    """One layer, one method and one format on one device."""

    layer: RandomLayer
    method: str
    format: Format
    options: MethodOptions
    device: str

    def quantize(
        self, experts: Sequence[int], batch: int | None = None, device: str | None = None
    ) -> dict[int, Expert]:
        """The experts' records, ``batch`` of them at a time if not as many as the pipeline takes."""
        quantizer = LayerQuantizer(self.method, self.layer.shape, silu_gate, self.options, batch)
        jobs = self.layer.jobs(self.format, experts, device or self.device)
        return {
            expert: Expert(entry.error, record, RecordLayout(self.layer.shape, entry.format, entry.input_scale))
            for expert, entry, record in quantizer.run(jobs)
        }

    def seconds(self, experts: Sequence[int], batch: int | None = None) -> tuple[float, dict[int, Expert]]:
        """Wall time until the last record is in host memory."""
        self._synchronize()
        started = time.perf_counter()
        made = self.quantize(experts, batch)
        self._synchronize()
        return time.perf_counter() - started, made

    def measure(self, alone: int, checked: int) -> dict[str, Any]:
        """Seconds of the whole layer batched and of ``alone`` experts one by one, and ``checked`` experts against those
        that the CPU makes."""
        everyone = range(len(self.layer.down))
        together = batch_size(self.layer.shape, torch.device(self.device))
        self.quantize(everyone[:together])  # compiles kernels and grows memory pools
        self.quantize(everyone[:1], 1)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
        before = self._peak()
        batched, made = self.seconds(everyone)
        peak = self._peak()
        single, _ = self.seconds(everyone[:alone], 1)
        on_cpu, reference = replace(self, device="cpu").seconds(everyone[:checked], 1)
        return {
            "batched_seconds": batched,
            "experts": len(everyone),
            "experts_together": together,
            "one_by_one_seconds_per_expert": single / alone,
            "one_by_one_layer_seconds": single / alone * len(everyone),
            "one_by_one_measured_on": alone,
            "device_bytes": None if peak is None or before is None else peak - before,
            "median_error": statistics.median(each.error for each in made.values()),
            "check": {**compared(made, reference), "cpu_seconds": on_cpu},
        }

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def _peak(self) -> int | None:
        return None if self.device == "cpu" else torch.cuda.max_memory_allocated(self.device)


def compared(made: dict[int, Expert], reference: dict[int, Expert]) -> dict[str, Any]:
    """Share of equal codes and how far errors are apart, over the experts of ``reference``."""
    equal = total = 0
    apart = []
    for expert, wanted in reference.items():
        for mine, theirs in zip(_codes(made[expert]), _codes(wanted), strict=True):
            equal, total = equal + int((mine == theirs).sum()), total + mine.numel()
        apart.append(made[expert].error / wanted.error - 1)
    worst = max(apart, key=abs)
    return {
        "experts": len(reference),
        "equal_codes": equal / total,
        "error_apart": worst,
        "passed": abs(worst) <= ERROR_TOLERANCE,
    }


def _codes(expert: Expert) -> list[Tensor]:
    views = expert.layout.views(expert.record)
    return [
        unpack_codes(views[f"{name}.codes"], expert.layout.format.bits, columns)
        for name, (_, columns) in expert.layout.shape.matrices.items()
    ]
