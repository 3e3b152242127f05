"""The sensitivity file: what every expert of one model loses in each format, measured once, read by every plan.

JSON of about 100 bytes an expert and format::

    {"format": "expertflow-sensitivity", "version": 1,
     "model": {"name": "moe", "weights": "<sha256, see weights_digest>"},
     "samples": {"source": "generated, calibration split, seed 0", "count": 128, "digest": "<sha256>"},
     "measure": {"at": "predictions", "temperature": 2.0, "probes": 2, "seed": 0, "answer_tokens": 620}
                or {"at": "outputs"},
     "method": "gptq", "scales": "absmax", "formats": ["int2-g32", ...],
     "made": {"command": "python -m calibration sensitivity ...", "packages": {...}},
     "text_share": [0.93, ...],                       a number for each layer, only at predictions
     "layers": [{"experts": [{"tokens": 812, "weights": 73728, "damage": {"int2-g32": 0.0013, ...}}, ...]}, ...]}

``damage`` at predictions: nats an answer token (``calibration.sensitivity``); at outputs: a share of the layer's
output (``calibration.measure``). Either can be added over experts, and only compared within one file. ``tokens``
were routed to the expert; ``weights`` counts its weights. ``method`` made the quantized experts: "rtn" rounds them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibration.plan import ExpertErrors
from expertflow_quant.formats import ExpertFlowError, Format

FILE_FORMAT, VERSION = "expertflow-sensitivity", 1
_END_BYTES = 1 << 22
_DECIDES = ("model", "samples", "measure", "method", "scales")


@dataclass(frozen=True)
class Origin:
    """What decides a measurement, as in the file; ``made`` and what is found only by measuring do not."""

    model: Mapping[str, str]
    samples: Mapping[str, Any]
    measure: Mapping[str, Any]
    method: str
    scales: str
    formats: Sequence[Format]
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """A file's content."""

    origin: Origin
    experts: Sequence[ExpertErrors]
    text_share: Sequence[float] = ()

    def save(self, path: Path) -> None:
        """Writes the file, and the folder it is in."""
        layers: dict[int, list[dict[str, Any]]] = {}
        for expert in sorted(self.experts, key=lambda e: (e.layer, e.expert)):
            damage = {form.name: float(f"{expert.damage[form]:.6g}") for form in self.origin.formats}
            entry = {"tokens": expert.tokens, "weights": expert.weights, "damage": damage}
            layers.setdefault(expert.layer, []).append(entry)
        value = {"format": FILE_FORMAT, "version": VERSION} | asdict(self.origin)
        value["formats"] = [form.name for form in self.origin.formats]
        if self.text_share:
            value["text_share"] = [round(share, 4) for share in self.text_share]
        value["layers"] = [{"experts": layers[layer]} for layer in sorted(layers)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        """Reads the file back. Raises ExpertFlowError, naming what is wrong, for anything but a whole one."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExpertFlowError(f"{path} cannot be read as JSON ({error}): measure again") from error
        if not isinstance(value, dict) or value.get("format") != FILE_FORMAT:
            raise ExpertFlowError(f"{path} is no sensitivity file: make one with `python -m calibration sensitivity`")
        if value.get("version") != VERSION:
            raise ExpertFlowError(f"{path} has version {value.get('version')!r}, this reads {VERSION}: measure again")
        try:
            formats = [Format.parse(name) for name in value["formats"]]
            origin = Origin(**{name: value[name] for name in _DECIDES}, formats=formats, made=value.get("made", {}))
            experts = [
                _expert(layer, expert, entry, formats)
                for layer, row in enumerate(value["layers"])
                for expert, entry in enumerate(row["experts"])
            ]
            return cls(origin, experts, [float(share) for share in value.get("text_share", ())])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ExpertFlowError(f"{path} is damaged ({type(error).__name__}: {error}): measure again") from error

    def check_model(self, path: Path, model: Path, layers: Sequence[int]) -> None:
        """Raises ExpertFlowError unless this was measured on ``model``, whose layers have ``layers`` experts."""
        if (digest := weights_digest(model)) != self.origin.model.get("weights"):
            raise ExpertFlowError(
                f"{path} was measured on {self.origin.model.get('name')} with weights "
                f"{str(self.origin.model.get('weights'))[:12]}..., {model} has {digest[:12]}...: measure this model"
            )
        found = [sum(e.layer == layer for e in self.experts) for layer in range(len(layers))]
        if found != list(layers) or len(self.experts) != sum(layers):
            raise ExpertFlowError(f"{path} has {found} experts in its layers, {model} {list(layers)}: measure again")

    def chosen(self, path: Path, formats: Sequence[Format]) -> list[ExpertErrors]:
        """The experts with the damages of ``formats`` alone. Raises ExpertFlowError for one that was not measured."""
        missing = [form.name for form in formats if form not in self.origin.formats]
        if missing:
            known = ", ".join(form.name for form in self.origin.formats)
            raise ExpertFlowError(f"{path} does not hold {', '.join(missing)} but {known}: choose from these")
        return [
            ExpertErrors(e.layer, e.expert, e.weights, e.tokens, {form: e.damage[form] for form in formats})
            for e in self.experts
        ]


def weights_digest(model: Path) -> str:
    """SHA-256 over the ends of the model's weight files and their sizes: tells models apart, quickly."""
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_END_BYTES)
            file.seek(max(0, size - _END_BYTES))
            digest.update(f"{path.name} {size}\n".encode() + head + file.read())
    return digest.hexdigest()


def _expert(layer: int, expert: int, entry: Mapping[str, Any], formats: Sequence[Format]) -> ExpertErrors:
    damage = {form: float(entry["damage"][form.name]) for form in formats}
    for form, value in damage.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"the damage of {form} to expert {expert} of layer {layer} is {value}")
    return ExpertErrors(layer, expert, int(entry["weights"]), int(entry["tokens"]), damage)
