"""Everything that a comparison found, as JSON, as Markdown and for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.compare.changed import Card, Changed
from eval.compare.sizes import Matching, Size, match
from eval.comparison import Comparison, overall_verdict, pairs_of
from eval.judge import Judgement
from eval.report import fine_points, mebibytes, percent, points, results_json, share_cell
from eval.stats import INCONCLUSIVE
from eval.tasks import Task

JUDGED, OWN, DENSE, AGAIN = "judged", "own full precision", "dense baseline", "own full precision, asked again"


@dataclass(frozen=True)
class Pair:
    """A system and a baseline over all tasks."""

    system: str
    baseline: str
    role: str
    margin: float
    matching: Matching | None
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> str:
        """Over all tasks: it passes only where each of them does."""
        return overall_verdict(self.comparisons)


@dataclass(frozen=True)
class Report:
    """Systems in the order of the tables; ``roles`` and ``sizes`` by label; ``changed`` names every question that
    any pair scores differently, ``cards`` shows as many of them as the page has room for."""

    title: str
    made: Mapping[str, Any]
    settings: Mapping[str, Any]
    tasks: Sequence[Task]
    judgements: Sequence[Judgement]
    roles: Mapping[str, str]
    sizes: Mapping[str, Size | None]
    comparisons: Sequence[Comparison]
    changed: Sequence[Changed] = ()
    cards: Sequence[Card] = ()

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, in the order compared."""
        return [
            Pair(
                system,
                baseline,
                AGAIN if self.roles[system] == AGAIN else self.roles[baseline],
                found[0].margin,
                match(self.sizes[system], self.sizes[baseline]),
                tuple(found),
            )
            for (system, baseline), found in pairs_of(self.comparisons).items()
        ]

    @property
    def shown(self) -> int:
        """Changed questions that have a card."""
        return sum(len(card.questions) for card in self.cards)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        base = results_json(dict(self.made), dict(self.settings), self.tasks, self.judgements, self.comparisons)
        for entry in base["systems"]:
            size = self.sizes[entry["label"]]
            entry |= {"role": self.roles[entry["label"]], "size": size.to_json() if size else None}
        pairs = [
            {
                "system": pair.system,
                "baseline": pair.baseline,
                "role": pair.role,
                "margin": pair.margin,
                "verdict": pair.verdict,
                "matching": pair.matching.to_json() if pair.matching else None,
                "lost": [c.id for c in self.changed if c.changes.get(number) == "lost"],
                "won": [c.id for c in self.changed if c.changes.get(number) == "won"],
            }
            for number, pair in enumerate(self.pairs)
        ]
        return base | {"title": self.title, "pairs": pairs}


def markdown(report: Report) -> str:
    """Verdicts, systems, differences, and differences by kind and split, as Markdown tables."""
    parts = [f"# {report.title}", asked(report), "## Verdicts", _table(*verdict_cells(report))]
    parts += [READING, "## Systems", _table(*system_cells(report))]
    parts += ["## Differences", _table(*difference_cells(report))]
    for pair in report.pairs:
        parts += [f"## {pair.system} against {pair.baseline}, by kind and split", _table(*group_cells(report, pair))]
    made = report.made
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    parts += ["## How it was made", f"`{made['command']}`", f"{made['device']}; Python {made['python']}, {packages}."]
    return "\n\n".join(parts) + "\n"


DECIDE = "items to decide: if equal / as seen"
READING = (
    "A pair passes where every task does: the lower end of the 90 % interval of the mean difference (a one-sided 95 % "
    "bound, paired by item, bootstrapped by image) above minus the margin is non-inferior, above zero superior. "
    "Matched: what of the baseline is within a tenth of the system's."
)


def asked(report: Report) -> str:
    """How many questions about how many images."""
    told = [(task.description, task.title) for task in report.tasks]
    counts = " and ".join(f"{of['items']:,} questions about {of['images']:,} {title}" for of, title in told)
    same = "the same items, prompts and batches for every system, greedy."
    return " ".join(filter(None, [f"{counts}; {same}", zeros(report), unasked(report)]))


def zeros(report: Report) -> str:
    """What scores 0 because it could not be asked (of every system) or was not answered (by one); "" where all was."""
    damaged = [f"{len(task.damaged)} damaged rows of {task.title}" for task in report.tasks if task.damaged]
    rows = sum(len(task.damaged) for task in report.tasks)
    failed = [(judgement.failures - rows, judgement.system.label) for judgement in report.judgements]
    told = [*damaged, *(f"{count} items that failed of {label}" for count, label in failed if count)]
    return f"Counted as 0: {', '.join(told)}." if told else ""


def unasked(report: Report) -> str:
    """Which of the two comparisons that belong together was not made; "" where both were."""
    told = {
        OWN: "Not compared with its own full precision (--self), so what quantizing costs is not told.",
        DENSE: "Not compared with a dense model (--dense), so whether it scores below one is not told.",
    }
    return " ".join(text for role, text in told.items() if role not in report.roles.values())


def verdict_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """One row a pair."""
    columns = ["system", "against", "what it is", "matched in", "margin", "verdict", "recovery %", DECIDE]
    rows = []
    for pair in report.pairs:
        recovery = [c.recovery for c in pair.comparisons]
        rows.append(
            [
                pair.system,
                pair.baseline,
                pair.role,
                matched_cell(pair),
                f"{100 * pair.margin:g}",
                pair.verdict,
                " / ".join("-" if share is None else percent(share) for share in recovery),
                decide_cell(pair.comparisons),
            ]
        )
    return columns, rows


def system_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """One row a system: sizes, speed, scores."""
    columns = ["system", "what it is", "parameters M", "active M", "weights MiB", "on device MiB", "expert MiB"]
    columns += ["tokens/s", "hit rate %"]
    columns += [f"{task.title}: {task.metric.title} %" for task in report.tasks]
    rows = []
    for judgement in report.judgements:
        label = judgement.system.label
        size = report.sizes[label]
        sizes = ["-"] * 4
        if size:
            sizes = [f"{size.total / 1e6:.2f}", f"{size.active / 1e6:.2f}", mebibytes(size.stored)]
            sizes.append(mebibytes(size.device))
        scores = [percent(judgement.mean(task.name)) for task in report.tasks]
        speed = [f"{judgement.tokens_per_second:.1f}", share_cell(judgement.hit_rate)]
        rows.append([label, report.roles[label], *sizes, mebibytes(judgement.expert_bytes), *speed, *scores])
    return columns, rows


def difference_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """One row a pair and task, in points."""
    titles = {task.name: task.title for task in report.tasks}
    columns = ["system", "against", "task", "difference", "90 % interval", "standard error", "better / worse"]
    columns += ["McNemar p", "same answers %", "recovery %", "margin", "verdict", DECIDE]
    rows = []
    for c in report.comparisons:
        d = c.difference
        rows.append(
            [
                c.system,
                c.baseline,
                titles[c.task],
                fine_points(d.mean),
                f"{fine_points(d.lower)} .. {fine_points(d.upper)}",
                f"{100 * d.standard_error:.2f}",
                f"{d.better} / {d.worse}",
                f"{d.mcnemar:.3f}",
                percent(c.same_predictions / d.items),
                "-" if c.recovery is None else percent(c.recovery),
                f"{100 * c.margin:g}",
                c.verdict,
                decide_cell([c]),
            ]
        )
    return columns, rows


def group_cells(report: Report, pair: Pair) -> tuple[list[str], list[list[str]]]:
    """One row a kind and a split of every task; descriptive."""
    titles = {task.name: task.title for task in report.tasks}
    columns = ["task", "by", "group", "items", f"{pair.system} %", f"{pair.baseline} %", "difference", "90 % interval"]
    columns.append("better / worse")
    rows = []
    for c in pair.comparisons:
        for g in c.groups:
            scores = [percent(g.system_mean), percent(g.baseline_mean), points(g.mean)]
            interval = " .. ".join(points(bound) for bound in g.interval) if g.better or g.worse else "-"
            better = f"{g.better} / {g.worse}"
            rows.append([titles[c.task], g.dimension, g.name, str(g.items), *scores, interval, better])
    return columns, rows


def matched_cell(pair: Pair) -> str:
    """In what the baseline's size is the system's; "-" where that says nothing or is not known."""
    return pair.matching.text if pair.role == DENSE and pair.matching else "-"


def decide_cell(comparisons: Sequence[Comparison]) -> str:
    """Where inconclusive, how many items a task would decide: were the systems equal / were it as observed."""
    open_ones = [c for c in comparisons if c.verdict == INCONCLUSIVE]
    if not open_ones:
        return "-"
    even = max(c.difference.items_to_decide(c.margin) for c in open_ones)
    observed = [c.difference.items_as_observed(c.margin) for c in open_ones]
    as_observed = "-" if None in observed else f"{max(n for n in observed if n is not None):,}"
    return f"{even:,} / {as_observed}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
