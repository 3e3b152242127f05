"""Every system that a run can compare, in the order in which they run."""

from collections.abc import Sequence

from eval.speed.baselines import BASELINES
from eval.speed.fast import OURS
from eval.speed.systems import SystemSpec
from expertflow_quant.formats import ExpertFlowError

SYSTEMS: tuple[SystemSpec, ...] = (*BASELINES, *OURS)


def chosen_systems(names: str | None) -> Sequence[SystemSpec]:
    """The systems whose names ``names`` lists with commas, all for None. Raises ExpertFlowError for others."""
    known = {spec.name: spec for spec in SYSTEMS}
    wanted = list(known) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    odd = [name for name in wanted if name not in known]
    if odd or not wanted:
        raise ExpertFlowError(f"systems {names!r}: {', '.join(odd) or 'none'} is not known: use {', '.join(known)}")
    return [spec for spec in SYSTEMS if spec.name in wanted]
