"""Per-item results on disk: one JSON line an item after one line of settings, durable batch by batch.

Layout of ``NAME.jsonl``: first line ``{"settings": {...}}``, then one line an item in the order asked (the
fields of ``ItemResult``). ``NAME.progress.json`` holds how many of those lines are final and the counters of
the expert cache up to there. Both are written after every batch, the lines first, so a run killed at any
point goes on from the last whole batch, and its batches are composed as they would have been.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


class ResultsError(ValueError):
    """Results that cannot be continued or read: the message names value, rule and remedy."""


@dataclass(frozen=True)
class ItemResult:
    """What one system answered to one item. ``seconds`` is the item's share of the time that its batch
    took."""

    id: str
    task: str
    kind: str
    family: str
    image_key: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    score: float
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    seconds: float
    error: str | None = None

    @classmethod
    def from_json(cls, line: str) -> "ItemResult":
        """Read one line back; ValueError or TypeError when it is not whole."""
        fields = json.loads(line)
        return cls(**fields | {"answers": tuple(fields["answers"])})

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self), ensure_ascii=True)


@dataclass
class ResultsFile:
    """The results of one system under fixed settings; ``open`` keeps what an earlier run with the same
    settings left."""

    path: Path
    settings: dict[str, Any]
    results: list[ItemResult] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> "ResultsFile":
        """Continue ``path`` or begin it. Raises ResultsError if it holds results of other settings."""
        settings = json.loads(json.dumps(settings))
        file = cls(path, settings)
        if path.exists():
            file._load()
        path.parent.mkdir(parents=True, exist_ok=True)
        file._write_all()
        return file

    @property
    def progress_path(self) -> Path:
        """Where the count of final lines and the cache counters lie."""
        return self.path.with_suffix(".progress.json")

    def append(self, batch: Sequence[ItemResult], counters: dict[str, float]) -> None:
        """Make one batch durable; ``counters`` are this batch's and add to those of the batches before."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(result.to_json() + "\n" for result in batch)
            file.flush()
            os.fsync(file.fileno())
        self.results.extend(batch)
        for name, value in counters.items():
            self.counters[name] = self.counters.get(name, 0) + value
        self._write_progress()

    def _load(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        _require_same(self.path, _settings_of(self.path, lines), self.settings)
        try:
            progress = json.loads(self.progress_path.read_text(encoding="utf-8"))
            done, counters = int(progress["items"]), dict(progress["counters"])
            results = [ItemResult.from_json(line) for line in lines[1 : done + 1]]
        except (OSError, ValueError, TypeError, KeyError):
            return  # nothing final to keep: begin again
        if len(results) == done:
            self.results, self.counters = results, counters

    def _write_all(self) -> None:
        lines = [json.dumps({"settings": self.settings}), *(result.to_json() for result in self.results)]
        _replace(self.path, "".join(line + "\n" for line in lines))
        self._write_progress()

    def _write_progress(self) -> None:
        _replace(self.progress_path, json.dumps({"items": len(self.results), "counters": self.counters}) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[ItemResult]]:
    """Settings and items of a finished ``NAME.jsonl``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return _settings_of(path, lines), [ItemResult.from_json(line) for line in lines[1:]]


def _settings_of(path: Path, lines: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(lines[0])["settings"])
    except (IndexError, ValueError, TypeError, KeyError):
        raise ResultsError(
            f"{path} does not begin with settings, so it is no results file: choose another --out"
        ) from None


def _require_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise ResultsError(
            f"{path} holds results of {name} = {found.get(name)!r}, this run has {wanted.get(name)!r}: "
            "results of different settings never mix; delete that folder or choose another --out"
        )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
