"""A format for every expert: the least damage within a budget, or the fewest bits within a damage.

Decided is the integer program

    least  sum_e damage[e, f_e]   with   sum_e size[e, f_e] <= budget

over the format f_e of every expert of the model at once, or the same with damage and size exchanged. Sizes are bits
of codes or bytes of whole records, scales and padding included. It is solved by HiGHS (scipy) to within 0.01 % of the
best; choices that no best plan can make (a wider format that does more damage) are left out first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout

_GAP = 1e-4
_SECONDS = 20.0


@dataclass(frozen=True)
class ExpertErrors:
    """What one expert loses in each format; ``weights`` counts its weights, ``tokens`` the tokens routed to
    it."""

    layer: int
    expert: int
    weights: int
    tokens: int
    damage: Mapping[Format, float]

    def __post_init__(self) -> None:
        if not self.damage or self.weights <= 0:
            raise ExpertFlowError(
                f"expert {self.expert} of layer {self.layer} has {len(self.damage)} measured formats and "
                f"{self.weights} weights: both must be above zero; measure again"
            )


@dataclass
class Choice:
    """A format for every expert: (layer, expert) -> format; with the damage and the average bits per
    weight."""

    formats: dict[tuple[int, int], Format] = field(default_factory=dict)
    damage: float = 0.0
    average_bits: float = 0.0

    def to_plan(self) -> dict[str, Any]:
        """The plan file that ``expertflow-quant quantize --plan`` reads: the most frequent format is the
        default."""
        used = sorted({form.name for form in self.formats.values()})
        default = max(used, key=lambda name: sum(form.name == name for form in self.formats.values()))
        layers: dict[str, dict[str, str]] = {}
        for (layer, expert), form in sorted(self.formats.items()):
            if form.name != default:
                layers.setdefault(str(layer), {})[str(expert)] = form.name
        return {"default": default, "layers": layers}


Size = Callable[[ExpertErrors, Format], float]


def code_bits(expert: ExpertErrors, form: Format) -> float:
    """Bits of an expert's codes."""
    return expert.weights * float(form.bits)


def record_size(shapes: Sequence[ExpertShape], input_scale: bool = False) -> Size:
    """Bytes of an expert's record in a layer of one of ``shapes``; ``input_scale``: as AWQ writes it."""
    made: dict[tuple[int, Format], int] = {}

    def size(expert: ExpertErrors, form: Format) -> float:
        key = (expert.layer, form)
        if key not in made:
            made[key] = RecordLayout(shapes[expert.layer], form, input_scale and form.name != "bf16").nbytes
        return made[key]

    return size


def choose(experts: Sequence[ExpertErrors], average_bits: float) -> Choice:
    """The least damage at ``average_bits`` of codes a weight. Raises ExpertFlowError when the narrowest formats are
    too wide."""
    total = sum(expert.weights for expert in experts)
    return choose_within(experts, code_bits, average_bits * total, f"an average of {average_bits:g} bits")


def choose_within(experts: Sequence[ExpertErrors], size: Size, budget: float, what: str) -> Choice:
    """The least damage at sizes of at most ``budget``, which errors call ``what``."""
    least = sum(min(size(expert, form) for form in expert.damage) for expert in experts)
    if not experts or budget < least:
        total = sum(expert.weights for expert in experts)
        narrowest = sum(expert.weights * min(form.bits for form in expert.damage) for expert in experts)
        raise ExpertFlowError(
            f"{what} cannot be reached: the smallest formats measured of {len(experts)} experts average "
            f"{narrowest / max(total, 1):g} bits and take {least / max(budget, 1e-30):.3g} times the budget; measure a "
            "narrower format or allow more"
        )
    return _solve(experts, lambda expert, form: expert.damage[form], size, budget)


def choose_damage(experts: Sequence[ExpertErrors], size: Size, most_damage: float) -> Choice:
    """The smallest size that does at most ``most_damage``. Raises ExpertFlowError when every format does more."""
    least = sum(min(expert.damage.values()) for expert in experts)
    if not experts or most_damage < least:
        raise ExpertFlowError(
            f"damage of at most {most_damage:g} cannot be reached: the best formats measured of {len(experts)} experts "
            f"do {least:g}; measure a wider format or allow more damage"
        )
    return _solve(experts, size, lambda expert, form: expert.damage[form], most_damage)


def _solve(experts: Sequence[ExpertErrors], worth: Size, use: Size, limit: float) -> Choice:
    """The least sum of ``worth`` among choices whose ``use`` sums to at most ``limit``."""
    picks = [
        (index, form, worth(expert, form), use(expert, form))
        for index, expert in enumerate(experts)
        for form in _undominated(expert, worth, use)
    ]
    taken = _program([pick[2] for pick in picks], [pick[3] for pick in picks], [pick[0] for pick in picks], limit)
    chosen = [(experts[picks[i][0]], picks[i][1]) for i in taken]
    total = sum(expert.weights for expert in experts)
    return Choice(
        {(expert.layer, expert.expert): form for expert, form in chosen},
        sum(expert.damage[form] for expert, form in chosen),
        sum(code_bits(expert, form) for expert, form in chosen) / total,
    )


def _undominated(expert: ExpertErrors, worth: Size, use: Size) -> list[Format]:
    """Formats beside which no other is at least as good in both, and better in one or earlier."""
    cheapest = sorted(expert.damage, key=lambda form: (use(expert, form), worth(expert, form), form.name))
    kept: list[Format] = []
    for form in cheapest:
        if not kept or worth(expert, form) < worth(expert, kept[-1]):
            kept.append(form)
    return kept


def _program(worth: Sequence[float], use: Sequence[float], owner: Sequence[int], limit: float) -> list[int]:
    """Which picks are taken: one for each owner, with the least sum of ``worth`` at a ``use`` of at most ``limit``."""
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ExpertFlowError("planning needs scipy: pip install 'expertflow-quant[plan]'") from error
    columns, owners = list(range(len(worth))), owner[-1] + 1
    one_each = sparse.csr_array(([1.0] * len(worth), (owner, columns)), shape=(owners, len(worth)))
    within = sparse.csr_array([[each / (limit or 1.0) for each in use]])
    spread = max(worth) or 1.0
    found = optimize.milp(
        [each / spread for each in worth],
        integrality=1,
        bounds=optimize.Bounds(0.0, 1.0),
        constraints=[
            optimize.LinearConstraint(one_each, 1.0, 1.0),
            optimize.LinearConstraint(within, -float("inf"), 1.0 if limit else 0.0),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise ExpertFlowError(f"no plan was found within {_SECONDS:g} s ({found.message}): measure fewer formats")
    return [column for column in columns if found.x[column] > 0.5]
