"""How large systems are, and in what a dense baseline matches: active parameters, all of them, or memory.

A comparison with a dense model means something only beside the rule by which that model was chosen.
"""

from dataclasses import asdict, dataclass
from typing import Any

from eval.judge import Judgement, System
from expertflow_quant.checkpoint.manifest import Manifest
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.seams import (
    expert_parameters,
    is_experts,
    model_class,
    num_experts,
    read_config,
    top_k,
)

CLOSE = 0.1
RULES = {"active": "active parameters", "total": "all parameters", "stored": "stored bytes", "device": "device bytes"}


@dataclass(frozen=True)
class Size:
    """``total`` parameters, those ``active`` for one token (everything but the experts it does not use; embeddings and
    image encoder count), ``stored`` bytes of weights, and ``device`` bytes of them under the expert memory judged."""

    total: int
    active: int
    stored: int
    device: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Matching:
    """A baseline's size by a system's, rule by rule; ``matched`` names the rules within a tenth."""

    ratios: dict[str, float]

    @property
    def matched(self) -> list[str]:
        return [RULES[name] for name, ratio in self.ratios.items() if abs(ratio - 1) <= CLOSE]

    @property
    def text(self) -> str:
        """ "active parameters (x 1.01)", or what it is when nothing matches."""
        close = [f"{RULES[n]} (x {ratio:.2f})" for n, ratio in self.ratios.items() if RULES[n] in self.matched]
        if close:
            return ", ".join(close)
        return "none: " + ", ".join(f"{RULES[name]} x {ratio:.2f}" for name, ratio in self.ratios.items())

    def to_json(self) -> dict[str, Any]:
        return {"ratios": {name: round(ratio, 4) for name, ratio in self.ratios.items()}, "matched": self.matched}


def size_of(judgement: Judgement) -> Size | None:
    """Sizes of a judged system; None for an endpoint, of which only its server knows."""
    system = judgement.system
    if system.endpoint is not None:
        return None
    total, active = parameters(system)
    if not system.is_checkpoint:
        stored = sum(path.stat().st_size for path in system.path.glob("*.safetensors"))
        return Size(total, active, stored, stored)
    manifest = Manifest.load(system.path)
    stored = manifest.expert_bytes + sum(entry.nbytes for entry in manifest.backbone)
    return Size(total, active, stored, stored - manifest.expert_bytes + judgement.device_expert_bytes)


def parameters(system: System) -> tuple[int, int]:
    """(all, active) parameters by the model's config, built without weights; shared ones count once."""
    import torch

    config = read_config(system.path)
    with torch.device("meta"):
        model = model_class(config)(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    unused = 0
    for name, module in model.named_modules():
        if is_experts(module):
            own = sum(module.get_parameter(p).numel() for p in expert_parameters(module).values())
            unused += own * (num_experts(module) - top_k(model, name)) // num_experts(module)
    return total, total - unused


def match(system: Size | None, baseline: Size | None) -> Matching | None:
    """How large ``baseline`` is beside ``system``; None where a size is not known."""
    if system is None or baseline is None:
        return None
    return Matching({name: getattr(baseline, name) / getattr(system, name) for name in RULES})


def sizes_of(judgements: list[Judgement]) -> dict[str, Size | None]:
    """By label. A model that transformers does not know has no size here, and is judged all the same."""
    found: dict[str, Size | None] = {}
    for judgement in judgements:
        try:
            found[judgement.system.label] = size_of(judgement)
        except ExpertFlowError:
            found[judgement.system.label] = None
    return found
