"""What is measured: quantized models, made by the public commands, uniform ones as checkpoints and mixed ones as plans.

A mixed model is put together from experts of the uniform checkpoints: each expert is quantized by itself, so its
record is the one that ``quantize --plan`` writes (``command`` proves it for one point).
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from eval.pool import ROOT
from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats import Format
from expertflow_quant.kernels import ExpertWeights, expert_weights
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations
from expertflow_quant.pipeline.quantize import DEFAULT_SAMPLES, quantize_model
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.pipeline.stream import ModelStream

METHODS = ("rtn", "awq", "gptq")
UNIFORM = ("int2-g32", "int3-g32", "int4-g32", "int8-g32")
MIXED_BITS = (2.25, 2.5, 2.75, 3.0, 3.5, 5.0)


@dataclass(frozen=True)
class Point:
    """A method with a format for every expert (``plan``); ``kind``: uniform or mixed, ``named``: of its plan or
    format."""

    method: str
    kind: str
    named: str
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.method}-{self.named}"


@dataclass(frozen=True)
class Bank:
    """The uniform checkpoints in ``folder``, one for each method and format, and the plans."""

    model: Path
    folder: Path
    formats: Sequence[str] = UNIFORM

    def make(self, method: str, samples: int, mixed: Sequence[float]) -> Iterator[str]:
        """Quantizes on the usual calibration items, measures the sensitivity of what was made, plans; says before each
        step what it is. What is there already stays."""
        for form in self.formats:
            if not (self._checkpoint(method, form) / MANIFEST_FILE).is_file():
                yield f"quantize {method} {form}"
                quantize_model(
                    self.model, self._checkpoint(method, form), method=method, plan=form,
                    observations=self._observations,
                )  # fmt: skip
        if mixed and not self._sensitivity(method).exists():
            yield f"sensitivity {method}"
            given = [part for form in self.formats for part in ("--quantized", str(self._checkpoint(method, form)))]
            self._calibration("sensitivity", str(self.model), "--out", str(self._sensitivity(method)),
                              "--samples", str(samples), "--device", "cpu", *given)  # fmt: skip
        for bits in mixed:
            if not self._plan(method, bits).exists():
                yield f"plan {method} {bits:g} bits"
                self._calibration("plan", str(self.model), "-o", str(self._plan(method, bits)), "--average-bits",
                                  f"{bits:g}", "--sensitivity", str(self._sensitivity(method)), "--formats",
                                  ",".join(self.formats), "--method", method)  # fmt: skip

    def points(self, method: str, mixed: Sequence[float]) -> list[Point]:
        """Uniform ones, then mixed ones."""
        uniform = [Point(method, "uniform", form, Plan.uniform(form)) for form in self.formats]
        plans = [Point(method, "mixed", f"mixed-{bits:g}", Plan.load(self._plan(method, bits))) for bits in mixed]
        return uniform + plans

    def experts(self, point: Point) -> dict[tuple[int, int], ExpertWeights]:
        """(layer, expert) to its decoded weights."""
        readers = self._readers(point.method)
        return {
            (layer, expert): _decoded(readers[point.plan.format(layer, expert)], layer, expert)
            for layer, expert in self._places(readers)
        }

    def bits(self, point: Point) -> tuple[float, float, int]:
        """Average bits of the codes, and of whole records; bytes of all records."""
        readers = self._readers(point.method)
        codes = weights = nbytes = 0
        for layer, expert in self._places(readers):
            form = point.plan.format(layer, expert)
            entry = readers[form].layers[layer]
            size = sum(rows * columns for rows, columns in entry.shape.matrices.values())
            codes, weights = codes + size * form.bits, weights + size
            nbytes += entry.experts[expert].nbytes
        return codes / weights, 8 * nbytes / weights, nbytes

    def same_records(self, point: Point, made: CheckpointReader) -> tuple[int, int]:
        """How many of a checkpoint's records have the bytes of this point's, of how many."""
        readers = self._readers(point.method)
        places = list(self._places(readers))
        same = [
            torch.equal(made.record(layer, expert), readers[point.plan.format(layer, expert)].record(layer, expert))
            for layer, expert in places
        ]
        return sum(same), len(places)

    def text_shares(self, method: str) -> list[float]:
        """Of each layer, as the sensitivity was measured."""
        return list(json.loads(self._sensitivity(method).read_text(encoding="utf-8"))["text_share"])

    def plan_file(self, point: Point) -> Path:
        """Of a mixed point."""
        return self.folder / "plans" / f"{point.name}.json"

    def _readers(self, method: str) -> Mapping[Format, CheckpointReader]:
        return {Format.parse(form): CheckpointReader(self._checkpoint(method, form)) for form in self.formats}

    def _places(self, readers: Mapping[Format, CheckpointReader]) -> Iterator[tuple[int, int]]:
        layers = next(iter(readers.values())).layers
        return ((layer, expert) for layer, entry in enumerate(layers) for expert in range(len(entry.experts)))

    def _checkpoint(self, method: str, form: str) -> Path:
        return self.folder / "uniform" / f"{method}-{form}"

    def _sensitivity(self, method: str) -> Path:
        return self.folder / "plans" / f"{method}.sensitivity.json"

    def _plan(self, method: str, bits: float) -> Path:
        return self.folder / "plans" / f"{method}-mixed-{bits:g}.json"

    @cached_property
    def _observations(self) -> Observations:
        """Of the items that the command ``quantize`` takes; once for all methods and formats."""
        stream = ModelStream(self.model)
        data = CalibrationData.from_samples(load_processor(self.model), generated_samples(DEFAULT_SAMPLES))
        return Observations(stream, data, keep=True)

    def _calibration(self, *arguments: str) -> None:
        run_command([sys.executable, "-m", "calibration", *arguments])


def run_command(command: Sequence[str]) -> None:
    """Raises ValueError with the end of what the command printed when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")


def _decoded(reader: CheckpointReader, layer: int, expert: int) -> ExpertWeights:
    layout = reader.layers[layer].layouts[expert]
    return expert_weights(layout.views(reader.record(layer, expert)), layout, torch.float32)
