"""Random expert records: a source for the host store that holds one template per layout for any number of experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.speed.random_model import MoeLayer
from expertflow_quant.formats import SCALE_DTYPE, WEIGHT_DTYPE, ExpertShape, Format, RecordLayout

STEP = 1_000_003  # a prime: consecutive experts' codes start far apart


@dataclass(frozen=True)
class RandomLayer:
    """What the store asks of one MoE layer."""

    module: str
    shape: ExpertShape
    top_k: int
    layouts: tuple[RecordLayout, ...]


class RandomRecords:
    """A RecordSource over random records, all in one format.

    A record is its layout's template with the codes (bf16: the weights) rotated by a distance of its own, so that
    experts differ and making one costs one copy. Scales are such that a matrix keeps the size of its input:
    weights have a deviation of about 1 / sqrt(columns), and nothing is ever NaN or infinite.
    """

    def __init__(self, layers: Sequence[RandomLayer], seed: int = 0) -> None:
        self.layers = list(layers)
        self._seed = seed
        self._templates: dict[RecordLayout, Tensor] = {}

    @classmethod
    def of(cls, layers: Sequence[MoeLayer], format: Format, seed: int = 0) -> "RandomRecords":
        """Records for a model's layers. Raises ExpertFlowError when ``format`` does not fit their sizes."""
        return cls(
            [
                RandomLayer(layer.name, layer.shape, layer.top_k, (RecordLayout(layer.shape, format),) * layer.experts)
                for layer in layers
            ],
            seed,
        )

    def record(self, layer: int, expert: int) -> Tensor:
        """The record of one expert, uint8 ``[nbytes]`` on the CPU, new at every call, equal for equal arguments."""
        layout = self.layers[layer].layouts[expert]
        template = self._templates.get(layout)
        if template is None:
            template = self._templates[layout] = template_record(layout, self._seed)
        record = torch.empty_like(template)
        distance = (layer * len(self.layers[layer].layouts) + expert) * STEP
        end = 0
        for name, field in layout.fields.items():  # each byte is written once
            if name.endswith((".codes", ".weight")):
                record[end : field.offset].copy_(template[end : field.offset])
                end = field.offset + field.nbytes
                _rotate(record[field.offset : end], template[field.offset : end], distance * field.dtype.itemsize)
        record[end:].copy_(template[end:])
        return record


def template_record(layout: RecordLayout, seed: int) -> Tensor:
    """One random record of ``layout``, uint8 ``[nbytes]``."""
    generator = torch.Generator().manual_seed(seed)
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, view in layout.views(record).items():
        matrix, _, kind = name.partition(".")
        columns = layout.shape.matrices[matrix][1]
        view.copy_(_values(kind, view, layout.format, columns, generator))
    return record


def _values(kind: str, view: Tensor, format: Format, columns: int, generator: torch.Generator) -> Tensor:
    if kind == "codes":
        return torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator)
    if kind == "zeros":
        return torch.full(view.shape, format.levels // 2, dtype=torch.uint8)
    noise = torch.rand(view.shape, generator=generator)
    if kind == "scales":  # codes spread evenly over `levels` have a deviation of levels / sqrt(12)
        return (math.sqrt(12 / columns) / format.levels * (0.75 + 0.5 * noise)).to(SCALE_DTYPE)
    if kind == "input_scale":
        return (0.75 + 0.5 * noise).to(SCALE_DTYPE)
    if kind == "bias":
        return (0.02 * (noise - 0.5)).to(WEIGHT_DTYPE)
    return (math.sqrt(12 / columns) * (noise - 0.5)).to(WEIGHT_DTYPE)


def _rotate(target: Tensor, source: Tensor, distance: int) -> None:
    start = distance % source.numel()
    target[start:].copy_(source[: source.numel() - start])
    target[:start].copy_(source[source.numel() - start :])
