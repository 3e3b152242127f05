"""Quantizes a model: every expert by one method into the formats of a plan, layer by layer, into a
checkpoint.

Each layer is durable before the next begins, and so are the calibration data's activations behind it; run again
with the same arguments, an interrupted run goes on with the first unfinished layer and ends with the same bytes.
What goes into the bytes, and so must be the same, is the job: the model's files, method, plan, options,
calibration data, versions of torch, transformers and this package.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import read_json
from expertflow_quant.checkpoint.manifest import ExpertEntry, LayerEntry, Manifest
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.checkpoint.writer import CheckpointWriter
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.spec import Format
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationData, CalibrationSample
from expertflow_quant.pipeline.methods import Job, LayerQuantizer, MethodOptions, check_formats, check_method
from expertflow_quant.pipeline.observe import Observations, ObservedLayer, ObserveOptions, in_dtype
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.pipeline.stream import ModelStream, MoELayer
from expertflow_quant.quantize import ScaleRangeError

DEFAULT_SAMPLES = 128
COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
COPIED_STEMS = ("LICENSE", "NOTICE")
NOT_COPIED = frozenset({"config.json", "manifest.json"})

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizeReport:
    """What was made: the folder, its manifest (sizes, errors, coverage per expert), seconds taken."""

    folder: Path
    manifest: Manifest
    seconds: float
    layers_resumed: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert records."""
        return self.manifest.expert_bytes

    @property
    def experts(self) -> list[tuple[int, int, ExpertEntry]]:
        """(layer, expert, entry) of every expert."""
        return [
            (layer, expert, entry)
            for layer, of in enumerate(self.manifest.layers)
            for expert, entry in enumerate(of.experts)
        ]

    @property
    def rare(self) -> list[tuple[int, int, ExpertEntry]]:
        """The experts that too few calibration tokens reached."""
        calibrated = self.manifest.made.get("calibration") is not None
        return [item for item in self.experts if calibrated and item[2].coverage != "routed"]


def quantize_model(
    model: Path | str | ModelStream,
    out: Path | str,
    *,
    method: str = "awq",
    plan: Plan | Format | str = "int4-g32",
    samples: list[CalibrationSample] | None = None,
    observations: Observations | None = None,
    options: MethodOptions | None = None,
    observe: ObserveOptions | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantizes the experts of the transformers model in folder ``model`` and writes a checkpoint to folder
    ``out``.

    ``plan``: one format, its name, or a plan per expert. ``samples``: conversations ``{"messages": [...]}``
    with PIL images; awq and gptq without any take 128 generated charts and documents. ``observations``
    instead of samples, made with ``keep=True``, spares running the model again for each of several methods;
    their device is used. rtn measures its errors on samples if it is given some, else on the weights.
    ``progress`` is told (experts done, of how many, layer). Raises ExpertFlowError for anything that does
    not fit, before the first expert where it can be seen there.
    """
    work = _Work(model, out, method, plan, samples, observations, options, observe, torch.device(device))
    return work.run(overwrite, progress or (lambda done, total, what: None))


class _Work:
    """One run: what was asked for, made definite."""

    def __init__(
        self,
        model: Path | str | ModelStream,
        out: Path | str,
        method: str,
        plan: Plan | Format | str,
        samples: list[CalibrationSample] | None,
        observations: Observations | None,
        options: MethodOptions | None,
        observe: ObserveOptions | None,
        device: torch.device,
    ) -> None:
        check_method(method)
        if observations is not None and (samples is not None or observe is not None):
            raise ExpertFlowError("observations were given together with samples or observe: give either")
        self.method, self.options, self.device = method, options or MethodOptions(), device
        self.plan = plan if isinstance(plan, Plan) else Plan.uniform(plan)
        self.stream = model if isinstance(model, ModelStream) else ModelStream(model)
        self.out = Path(out)
        self.plan.check([(layer.shape, layer.experts) for layer in self.stream.layers])
        if observations is not None:
            self._check_same_model(observations)
            self.device = observations.device
        check_formats(method, self._formats)
        self.observations = observations or self._observations(samples, observe)

    def run(self, overwrite: bool, progress: Progress) -> QuantizeReport:
        started = time.monotonic()
        writer = CheckpointWriter(self.out, self._job(), overwrite)
        if (manifest := writer.finished()) is not None:
            return QuantizeReport(self.out, manifest, time.monotonic() - started, len(manifest.layers))
        writer.write_backbone(self.stream.backbone())
        resumed = self._write_layers(writer, progress)
        self._write_files(writer)
        manifest = writer.finish(self._model_id, str(self.stream.config.model_type), self._made())
        self.stream.close()
        return QuantizeReport(self.out, manifest, time.monotonic() - started, resumed)

    def _write_layers(self, writer: CheckpointWriter, progress: Progress) -> int:
        layers = self.stream.layers
        finished = {layer.index for layer in layers if writer.finished_layer(layer.index) is not None}
        total, done = sum(layer.experts for layer in layers), sum(layers[index].experts for index in finished)
        progress(done, total, "observing" if self.observations is not None else "reading")
        left = [layer.index for layer in layers if layer.index not in finished]
        for layer, observed in self._observed(left, writer.scratch):
            if layer.index in left:
                for _ in self._write_layer(writer, layer, observed):
                    done += 1
                    progress(done, total, f"layer {layer.index}")
                if self.observations is not None and layer.index != left[-1]:
                    progress(done, total, "observing")
        return len(finished)

    def _observed(self, left: list[int], scratch: Path) -> Iterator[tuple[MoELayer, ObservedLayer | None]]:
        """From the first to the last of the layers that are ``left``, with what was observed there."""
        if self.observations is None or not left:
            yield from ((layer, None) for layer in self.stream.layers if layer.index in left)
            return
        for observed in self.observations.layers(left[0], scratch):
            yield observed.layer, observed
            if observed.layer.index == left[-1]:
                return

    def _write_layer(self, writer: CheckpointWriter, layer: MoELayer, observed: ObservedLayer | None) -> Iterator[int]:
        quantizer = LayerQuantizer(self.method, layer.shape, self.stream.gate(layer.index), self.options)
        made = {}
        try:
            for expert, entry, record in quantizer.run(self._jobs(layer, observed)):
                made[expert] = (entry, record)
                yield expert
        except ScaleRangeError as error:
            raise ExpertFlowError(f"layer {layer.index}: {error} for this expert, by a plan") from None
        experts = [made[expert] for expert in range(layer.experts)]
        writer.write_layer(layer.index, layer.module, layer.shape, layer.top_k, experts)

    def _jobs(self, layer: MoELayer, observed: ObservedLayer | None) -> Iterator[Job]:
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        for expert in range(layer.experts):
            weights = in_dtype(self.stream.expert(layer.index, expert), like)
            rows = None if observed is None else observed.rows(expert)
            yield Job(expert, self.plan.format(layer.index, expert), weights, rows)

    def _observations(
        self, samples: list[CalibrationSample] | None, observe: ObserveOptions | None
    ) -> Observations | None:
        if samples is None:
            if not self._needs_rows:
                return None
            samples = generated_samples(DEFAULT_SAMPLES)
        data = CalibrationData.from_samples(load_processor(self.stream.folder), samples)
        return Observations(self.stream, data, observe, self.device)

    def _check_same_model(self, observations: Observations) -> None:
        seen, wanted = observations.stream.folder.resolve(), self.stream.folder.resolve()
        if seen != wanted:
            raise ExpertFlowError(f"observations of {seen} do not calibrate {wanted}: observe the model itself")

    @property
    def _needs_rows(self) -> bool:
        return self.method != "rtn" and any(form.has_codes for form in self._formats)

    @cached_property
    def _formats(self) -> set[Format]:
        return {self.plan.format(of.index, e) for of in self.stream.layers for e in range(of.experts)}

    @cached_property
    def _model_id(self) -> str:
        return self.stream.folder.resolve().name

    def _made(self) -> dict[str, object]:
        return {
            "method": self.method,
            "plan": self.plan.to_json(),
            "options": self.options.to_json(),
            "calibration": None if self.observations is None else self.observations.about(),
            "packages": {
                "expertflow-quant": getattr(sys.modules["expertflow_quant"], "__version__", "unknown"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _job(self) -> dict[str, object]:
        """All that decides the bytes; the files by size and time of change, for hashing them would take
        minutes."""
        files = {path.name: path.stat() for path in [*self._files(), *self.stream.shards.files]}
        states = {f"file {name}": [state.st_size, state.st_mtime_ns] for name, state in files.items()}
        return {**self._made(), "model": self._model_id, **states}

    def _files(self) -> list[Path]:
        """The model's own small files: configs, processor, tokenizer, templates, license."""
        return [
            path
            for path in sorted(self.stream.folder.iterdir())
            if path.is_file()
            and (path.suffix in COPIED_SUFFIXES or path.stem.upper().startswith(COPIED_STEMS))
            and not path.name.endswith(".index.json")
        ]

    def _write_files(self, writer: CheckpointWriter) -> None:
        config: Any = read_json(self.stream.folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.stream.folder}/config.json is no JSON object: download it again")
        config["quantization_config"] = {"quant_method": "expertflow", "version": 1}
        writer.write_json("config.json", json.loads(json.dumps(config)))
        for path in self._files():
            if path.name not in NOT_COPIED:
                writer.copy_file(path)


def layer_errors(layer: LayerEntry) -> tuple[float, float]:
    """(mean, largest) error over a layer's experts."""
    errors = [expert.error for expert in layer.experts]
    return sum(errors) / len(errors), max(errors)
