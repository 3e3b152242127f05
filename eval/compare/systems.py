"""From what the command line says to systems and tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.compare.report import AGAIN, DENSE, JUDGED, OWN
from eval.data.load import make_tasks
from eval.data.sets import DATA_SETS
from eval.judge import System
from eval.stats import MARGIN_DENSE, MARGIN_OWN
from eval.systems import system_named
from eval.tasks import GENERATED, Task
from expertflow_quant.formats import ExpertFlowError


@dataclass(frozen=True)
class Contest:
    """Who is judged, and against what. ``again``: the own full precision asked in other batches."""

    judged: tuple[System, ...]
    own: System | None
    dense: tuple[System, ...]
    again: System | None = None

    @property
    def systems(self) -> list[System]:
        """All of them, in the order of the tables."""
        return [*self.judged, *filter(None, [self.own]), *self.dense, *filter(None, [self.again])]

    @property
    def roles(self) -> dict[str, str]:
        """What each is here, by label."""
        found = {system.label: JUDGED for system in self.judged} | {system.label: DENSE for system in self.dense}
        found |= {self.own.label: OWN} if self.own else {}
        return found | ({self.again.label: AGAIN} if self.again else {})

    @property
    def pairs(self) -> list[tuple[System, System, float]]:
        """(system, baseline, margin): every judged system against its own full precision and every dense model, then
        full precision against the dense models, so that the cost of quantization is told from the choice of model."""
        own = [self.own] if self.own else []
        found = [(s, b, MARGIN_OWN) for s in self.judged for b in own]
        found += [(s, b, MARGIN_DENSE) for s in (*self.judged, *own) for b in self.dense]
        return found + [(self.again, b, MARGIN_OWN) for b in own if self.again]


def contest(
    systems: Sequence[str], own: str | None, dense: Sequence[str], expert_memory: str, ask_again: bool = False
) -> Contest:
    """Read the names; each is PATH, LABEL=PATH or LABEL=URL. Raises ExpertFlowError for what cannot be compared."""
    judged = tuple(system_named(text, expert_memory) for text in systems)
    base = system_named(own, expert_memory) if own else None
    others = tuple(system_named(text, expert_memory) for text in dense)
    if base is None and not others:
        raise ExpertFlowError("there is nothing to compare with: give --self, --dense or both")
    if ask_again and base is None:
        raise ExpertFlowError("--noise-floor asks the model of --self again: give --self")
    again = System(f"{base.name}-again", f"{base.label} again", base.path, base.expert_memory, base.endpoint) \
        if ask_again and base else None  # fmt: skip
    found = Contest(judged, base, others, again)
    names = [system.name for system in found.systems]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ExpertFlowError(f"two systems are called {twice!r}: tell them apart as LABEL=PATH")
    return found


def tasks_named(
    names: Sequence[str], items: int, seed: int, max_pixels: int | None = None, grain: float = 0.0
) -> list[Task]:
    """Tasks by NAME, or NAME=PATH for those that come from files, with at most ``items`` questions each."""
    named = [(name, path) for name, given, path in (text.partition("=") for text in names) if given]
    paths = dict(named)
    for name, path in named:
        if name in GENERATED:
            files = ", ".join(f"{other}={path}" for other in DATA_SETS)
            raise ExpertFlowError(f"task {name} is generated and reads no {path}: leave it out, or give one of {files}")
        if paths[name] != path:
            raise ExpertFlowError(f"task {name} is given {path} and {paths[name]}: compare on one at a time")
    chosen = [text.partition("=")[0] for text in names] or list(GENERATED)
    return make_tasks(chosen, paths, limit=items or None, seed=seed, max_pixels=max_pixels, grain=grain)
