"""What is compared: one format for all, plan files, and a plan by how often experts are used; all of equal bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.offload.trace import RoutingTrace

METHOD = "rtn"


@dataclass(frozen=True)
class Contender:
    """``name`` as tables call it; ``slots``: the file of its planned slots, if it has one."""

    name: str
    plan: Plan
    slots: Path | None = None


def by_use(traces: Sequence[RoutingTrace], narrow: Format, middle: Format, wide: Format) -> Plan:
    """Frequency alone: in every layer the third of the experts that most tokens used in ``wide``, the third that fewest
    used in ``narrow``, the others in ``middle``; as many bytes as ``middle`` for all where the widths are one bit
    apart. Raises ExpertFlowError for traces of other models."""
    if len({(trace.layers, trace.num_experts) for trace in traces}) != 1:
        raise ExpertFlowError(f"{len(traces)} traces to count use in must be of one and the same model, at least one")
    uses = sum(trace.paths().sum(0) for trace in traces)
    layers: dict[int, dict[int, Format]] = {}
    for layer, counts in enumerate(uses):  # type: ignore[arg-type]
        order = counts.argsort(descending=True, stable=True).tolist()
        third = len(order) // 3
        formats = dict.fromkeys(order[:third], wide) | dict.fromkeys(order[len(order) - third :], narrow)
        layers[layer] = dict(sorted(formats.items()))
    return Plan(middle, layers)


def named(values: Sequence[str] | None, what: str) -> dict[str, Path]:
    """NAME=FILE options as a table. Raises ExpertFlowError for one that is not so written, or a missing file."""
    found = {}
    for value in values or ():
        name, _, path = value.partition("=")
        if not name or not Path(path).is_file():
            raise ExpertFlowError(f"--{what} {value!r} is no NAME=FILE of a file that is there: name one")
        found[name] = Path(path)
    return found
