"""Which format each expert gets: one default, and what differs per layer or per expert.

As a file (JSON; layers count MoE layers from 0 in model order, experts from 0)::

    {"default": "int4-g32", "layers": {"0": {"3": "int2-g32", "7": "bf16"}, "1": "int8-g32"}}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import read_json
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.record import ExpertShape
from expertflow_quant.formats.spec import Format

_INDEX = re.compile(r"0|[1-9][0-9]*")
LayerPlan = Format | Mapping[int, Format]


@dataclass(frozen=True)
class Plan:
    """``default`` for every expert that ``layers`` (layer -> format, or expert -> format) does not name."""

    default: Format
    layers: Mapping[int, LayerPlan] = field(default_factory=dict)

    @classmethod
    def uniform(cls, form: Format | str) -> "Plan":
        """The same format for every expert."""
        return cls(Format.parse(form) if isinstance(form, str) else form)

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """The plan in a JSON file. Raises CheckpointError naming the file and what in it is wrong."""
        try:
            return cls.parse(read_json(Path(path)))
        except CheckpointError:
            raise
        except ExpertFlowError as error:
            raise CheckpointError(f"plan {path}: {error}") from error

    @classmethod
    def parse(cls, value: object) -> "Plan":
        """The plan that a JSON value describes. Raises ExpertFlowError for unknown keys, indices or
        formats."""
        if not isinstance(value, dict) or "default" not in value or set(value) - {"default", "layers"}:
            raise ExpertFlowError(
                f'a plan has the keys "default" and "layers" and no other, got {_shown(value)}: '
                'write {"default": "int4-g32", "layers": {"0": {"3": "int2-g32"}}}'
            )
        layers = _object(value.get("layers", {}), "layers")
        return cls(
            _format(value["default"], "default"),
            {_index(key, "layer"): _layer(entry, f"layer {key}") for key, entry in layers.items()},
        )

    def format(self, layer: int, expert: int) -> Format:
        """The format of one expert."""
        entry = self.layers.get(layer, self.default)
        return entry if isinstance(entry, Format) else entry.get(expert, self.default)

    def check(self, shapes: Sequence[tuple[ExpertShape, int]]) -> None:
        """Holds the plan against a model: ``shapes[l]`` is (shape, number of experts) of MoE layer ``l``.

        Raises ExpertFlowError when it names a layer or expert that is not there, or a format does not fit
        the sizes.
        """
        for layer, entry in self.layers.items():
            if layer >= len(shapes):
                raise ExpertFlowError(_unknown(f"MoE layer {layer}", len(shapes), "layers"))
            for expert in () if isinstance(entry, Format) else entry:
                if expert >= shapes[layer][1]:
                    raise ExpertFlowError(_unknown(f"expert {expert} of layer {layer}", shapes[layer][1], "experts"))
        for layer, (shape, experts) in enumerate(shapes):
            for form in {self.format(layer, expert) for expert in range(experts)}:
                for _, in_features in shape.matrices.values():
                    form.validate_for(in_features)

    def to_json(self) -> dict[str, object]:
        """The JSON value that ``parse`` reads back."""
        layers: dict[str, object] = {
            str(layer): entry.name if isinstance(entry, Format) else {str(e): entry[e].name for e in sorted(entry)}
            for layer, entry in sorted(self.layers.items())
        }
        return {"default": self.default.name, "layers": layers}

    def __str__(self) -> str:
        return f"{self.default.name}{' and others' if self.layers else ''}"


def _layer(entry: object, where: str) -> LayerPlan:
    if isinstance(entry, str):
        return _format(entry, where)
    return {
        _index(key, f"{where}: expert"): _format(text, f"{where}, expert {key}")
        for key, text in _object(entry, where).items()
    }


def _format(text: object, where: str) -> Format:
    if not isinstance(text, str):
        raise ExpertFlowError(f'{where}: {_shown(text)} is not a format: write its name as text, e.g. "int4-g32"')
    try:
        return Format.parse(text)
    except ExpertFlowError as error:
        raise ExpertFlowError(f"{where}: {error}") from error


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ExpertFlowError(f'{where}: {_shown(value)} is not an object: write {{"<index>": "<format>"}}')
    return value


def _index(key: str, what: str) -> int:
    if not _INDEX.fullmatch(key):
        raise ExpertFlowError(f"{what} {key!r} is not an index: write whole numbers from 0, in quotes")
    return int(key)


def _unknown(what: str, count: int, things: str) -> str:
    return f"the plan names {what}, but the model has {count} {things} (0 to {count - 1}): correct the plan"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
