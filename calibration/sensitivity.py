"""What each expert in each format costs the model's predictions, measured at the answers of calibration samples.

The damage of an expert in a format is the Kullback-Leibler divergence, in nats an answer token, that rounding this
expert alone adds to the model's predictions softened by a temperature, to second order (``pipeline.teacher``): for
each conversation the expert's changed outputs of all tokens, weighed by the router and by how far each moves the
answer, are summed before they are squared. So an expert is judged by the tokens that matter: on the shipped model
tokens of pictures are 81 % of all and a tenth of the effect. Adding damages of experts neglects how they interact.

Why not at temperature 1: a trained model is sure of nearly all of its answers, and a mean over a few hundred samples
is then that of the two or three tokens of which it is not; softened, every answer token says something.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from calibration.plan import ExpertErrors
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.kernels import ExpertWeights, expert_product, expert_weights
from expertflow_quant.pipeline.batches import AnsweredBatch
from expertflow_quant.pipeline.observe import in_dtype
from expertflow_quant.pipeline.observed import Tokens, expert_places
from expertflow_quant.pipeline.stream import ModelStream
from expertflow_quant.pipeline.teacher import ExpertsSeen, Teacher
from expertflow_quant.quantize import QuantizedMatrix, ScaleRule, quantize_rtn

Progress = Callable[[int, int], None]


class Quantized(Protocol):
    """Experts in several formats."""

    method: str

    def expert(self, layer: int, expert: int, form: Format) -> ExpertWeights:
        """Decoded, float32."""
        ...


class Rounded:
    """A model's experts rounded to nearest in ``formats``; codes are kept, a byte for each weight and format."""

    method = "rtn"

    def __init__(self, teacher: Teacher, formats: Sequence[Format], scales: ScaleRule) -> None:
        self._teacher, self._formats, self._scales = teacher, formats, scales
        self._kept: dict[tuple[int, int, Format], dict[str, QuantizedMatrix]] = {}

    def expert(self, layer: int, expert: int, form: Format) -> ExpertWeights:
        own = self._teacher.own(layer, expert)
        if form.name == "bf16":
            return own
        key = (layer, expert, form)
        if key not in self._kept:
            matrices = {name: getattr(own, name).float() for name in ("gate_up", "down")}
            self._kept[key] = {name: quantize_rtn(m, form, scales=self._scales) for name, m in matrices.items()}
        codes = self._kept[key]
        return ExpertWeights(
            codes["gate_up"].dequantize(),
            codes["down"].dequantize(),
            gate_up_bias=own.gate_up_bias,
            down_bias=own.down_bias,
        )


OTHER_MODEL = 0.9
"""Relative error of an expert's outputs that no rounding makes; unrelated weights are about 1.4 off."""


class Checkpoints:
    """The experts of quantized checkpoints of one model, each in one format throughout. Raises ExpertFlowError for
    other checkpoints."""

    def __init__(self, folders: Sequence[Path]) -> None:
        readers = [CheckpointReader(folder) for folder in folders]
        methods = {str(reader.manifest.made.get("method")) for reader in readers}
        if len(methods) != 1:
            raise ExpertFlowError(f"checkpoints made by {', '.join(sorted(methods))}: give those of one method")
        self.method = methods.pop()
        self._readers = {_only_format(reader): reader for reader in readers}
        self.formats = list(self._readers)

    def check_model(self, stream: ModelStream) -> None:
        """Raises ExpertFlowError unless each checkpoint's first expert answers about as that of ``stream``'s model."""
        hidden = torch.randn(64, stream.layers[0].shape.hidden, generator=torch.Generator().manual_seed(0))
        gate, exact = stream.gate(0), in_dtype(stream.expert(0, 0), hidden)
        wanted = expert_product(hidden, exact, gate)
        for form in self.formats:
            apart = (expert_product(hidden, self.expert(0, 0, form), gate) - wanted).norm() / wanted.norm()
            if not apart < OTHER_MODEL:
                raise ExpertFlowError(
                    f"the {form} checkpoint's first expert is {apart:.0%} off this model's: give checkpoints that were "
                    "quantized from it"
                )

    def expert(self, layer: int, expert: int, form: Format) -> ExpertWeights:
        reader = self._readers[form]
        layout = reader.layers[layer].layouts[expert]
        return expert_weights(layout.views(reader.record(layer, expert)), layout, torch.float32)


@dataclass(frozen=True)
class Measured:
    """``experts`` with their damages; ``text_share`` of each layer: the part of what changes at all tokens' outputs
    would cost that lies in text, the share that calibration should give to text tokens; ``answer_tokens`` that were
    judged."""

    experts: list[ExpertErrors]
    text_share: list[float]
    answer_tokens: int


@dataclass(frozen=True)
class Settings:
    """``temperature`` by which predictions are softened; ``probes`` backward passes a batch, drawn from ``seed``."""

    temperature: float = 2.0
    probes: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0) or self.probes < 1:
            raise ExpertFlowError(
                f"temperature {self.temperature:g} must be above zero (2 is usual) and probes {self.probes} at least 1"
            )


def measure_sensitivity(
    stream: ModelStream,
    teacher: Teacher,
    batches: Sequence[AnsweredBatch],
    quantized: Quantized,
    formats: Sequence[Format],
    settings: Settings,
    progress: Progress,
) -> Measured:
    """The damage of every format to every expert of ``stream``'s model, which ``teacher`` holds in memory.
    ``progress`` gets (batches done, batches)."""
    layers = stream.layers
    tally = _Tally(len(layers), max(layer.experts for layer in layers), len(formats))
    noise = torch.Generator().manual_seed(settings.seed)
    for done, batch in enumerate(batches, start=1):
        seen, probes = teacher.gradients(batch, settings.probes, settings.temperature, noise)
        tokens = Tokens.of(batch.inputs, stream.config)
        tally.answers += len(batch.places)
        for layer, of_layer in enumerate(seen):
            grads = [of_probe[layer] for of_probe in probes]
            tally.add_shares(layer, grads, tokens)
            for expert, places, weight in _routed(of_layer, tokens, layers[layer].experts):
                changes = _changes(stream, teacher, quantized, formats, of_layer.hidden[places], (layer, expert))
                tally.add(layer, expert, places, weight, changes, grads, batch.inputs["input_ids"].shape)
        progress(done, len(batches))
    return Measured(tally.experts(stream, formats, settings.probes), tally.text_share(), tally.answers)


class _Tally:
    """Sums over batches."""

    def __init__(self, layers: int, experts: int, formats: int) -> None:
        self.answers = 0
        self._damage = torch.zeros(layers, experts, formats, dtype=torch.float64)
        self._tokens = torch.zeros(layers, experts, dtype=torch.int64)
        self._pull = torch.zeros(layers, 2, dtype=torch.float64)

    def add_shares(self, layer: int, grads: Sequence[Tensor], tokens: Tokens) -> None:
        """What a change of the same size at every token would cost, of text and of other tokens."""
        for grad in grads:
            cost = grad.double().square().sum(1).cpu()
            text = float(cost[tokens.text & tokens.valid].sum())
            self._pull[layer] += torch.tensor([text, float(cost[tokens.valid].sum()) - text])

    def add(
        self, layer: int, expert: int, places: Tensor, weight: Tensor, changes: Sequence[Tensor],
        grads: Sequence[Tensor], shape: Sequence[int],
    ) -> None:  # fmt: skip
        """``changes`` [n, H] of each format at flattened ``places`` of a batch of ``shape``, ``weight`` [n]."""
        self._tokens[layer, expert] += len(places)
        row = (places // shape[1]).cpu()
        pulls = torch.stack([grad[places] for grad in grads]) * weight[:, None]  # [probes, n, H]
        for index, change in enumerate(changes):
            moved = (pulls * change.to(pulls.dtype)).sum(2).double().cpu()
            of_sample = torch.zeros(len(grads), shape[0], dtype=torch.float64).index_add_(1, row, moved)
            self._damage[layer, expert, index] += 0.5 * float(of_sample.square().sum())

    def text_share(self) -> list[float]:
        return [float(text / (text + other)) if text + other > 0 else 1.0 for text, other in self._pull]

    def experts(self, stream: ModelStream, formats: Sequence[Format], probes: int) -> list[ExpertErrors]:
        mean: list[list[list[float]]] = (self._damage / (probes * max(self.answers, 1))).tolist()
        sizes = [sum(rows * columns for rows, columns in layer.shape.matrices.values()) for layer in stream.layers]
        return [
            ExpertErrors(
                layer.index,
                expert,
                sizes[layer.index],
                int(self._tokens[layer.index, expert]),
                dict(zip(formats, mean[layer.index][expert], strict=True)),
            )
            for layer in stream.layers
            for expert in range(layer.experts)
        ]


def _routed(seen: ExpertsSeen, tokens: Tokens, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the router's weights) of every expert that has any that are not padding."""
    for expert, places in enumerate(expert_places(seen.index, experts)):
        at = places // seen.index.shape[1]
        kept = tokens.valid.to(at.device)[at]
        if bool(kept.any()):
            yield expert, at[kept], seen.affinity.reshape(-1)[places[kept]]


@torch.no_grad()
def _changes(
    stream: ModelStream, teacher: Teacher, quantized: Quantized, formats: Sequence[Format], inputs: Tensor,
    at: tuple[int, int],
) -> list[Tensor]:  # fmt: skip
    """What the expert answers to ``inputs`` [n, H] in each format, less its own answer."""
    gate, rows = stream.gate(at[0]), inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    exact = expert_product(rows, _moved(teacher.own(*at), rows), gate)
    return [expert_product(rows, _moved(quantized.expert(*at, form), rows), gate) - exact for form in formats]


def _moved(weights: ExpertWeights, like: Tensor) -> ExpertWeights:
    parts: Mapping[str, Tensor | None] = vars(weights)
    return ExpertWeights(**{name: None if part is None else part.to(like) for name, part in parts.items()})  # type: ignore[arg-type]


def _only_format(reader: CheckpointReader) -> Format:
    formats = {expert.format for layer in reader.layers for expert in layer.experts}
    if len(formats) != 1:
        names = ", ".join(sorted(str(form) for form in formats))
        raise ExpertFlowError(f"{reader.folder} has experts in {names}: give checkpoints of one format each")
    return formats.pop()
