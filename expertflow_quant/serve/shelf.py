"""Where ``up`` keeps the checkpoints that it made: a folder per model and settings, so nothing is made twice.

The folder's name ends in a digest of everything that decides the checkpoint: the model's files, the method,
the plan, the calibration items and the version of this package. Files up to 64 MiB count with their
content, larger ones with their size, their time of change and their first MiB.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

import expertflow_quant
from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats.errors import ExpertFlowError

_WHOLE = 64 << 20
_HEAD = 1 << 20
_KINDS = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})


@dataclass(frozen=True)
class Recipe:
    """What to make of which model. ``samples``: calibration items on disk, None for the generated ones."""

    model: Path
    method: str
    plan: Plan
    samples: Path | None = None

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise ExpertFlowError(
                f"{self.model} is no folder with a config.json: give the folder of a transformers model"
            )
        if is_finished(self.model):
            raise ExpertFlowError(
                f"{self.model} is quantized already: serve it with `expertflow-quant serve {self.model}`"
            )
        if self.samples is not None and not self.samples.exists():
            raise ExpertFlowError(f"there is no {self.samples}: give a folder or a parquet file to --samples")

    @property
    def digest(self) -> str:
        """24 hex digits that are equal when nothing that decides the checkpoint differs."""
        parts = {
            "version": expertflow_quant.__version__,
            "method": self.method,
            "plan": self.plan.to_json(),
            "model": _folder_digest(self.model),
            "samples": None if self.samples is None else _samples_digest(self.samples),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def default_shelf() -> Path:
    """``expertflow-quant`` in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "expertflow-quant"


def fetch(shelf: Path, recipe: Recipe, make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """The folder of the finished checkpoint for ``recipe``; ``make(folder)`` writes it or goes on with it.

    One process makes, others wait; a process that is killed frees its lock.
    """
    folder = place(shelf, recipe)
    if is_finished(folder):
        say(f"quantized before: {folder}")
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock"), say):
        if not is_finished(folder):
            make(folder)
    return folder


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process makes it (lock {path}): waiting")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def place(shelf: Path, recipe: Recipe) -> Path:
    """The folder on ``shelf`` for ``recipe``; it need not exist."""
    words = (recipe.model.resolve().name, recipe.method, str(recipe.plan))
    return shelf / "-".join([*(re.sub(r"[^A-Za-z0-9_.-]+", "-", word) for word in words), recipe.digest])


def is_finished(folder: Path) -> bool:
    """Whether a finished checkpoint lies there."""
    return (folder / MANIFEST_FILE).is_file()


def _folder_digest(folder: Path) -> list[tuple[str, str]]:
    files = sorted(path for path in folder.iterdir() if path.suffix in _KINDS and path.is_file())
    return [(path.name, _file_digest(path)) for path in files]


def _samples_digest(path: Path) -> list[tuple[str, str]]:
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return [(str(item.relative_to(path)), _file_digest(item)) for item in files]


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    return f"{head}-{state.st_size}-{state.st_mtime_ns}"
