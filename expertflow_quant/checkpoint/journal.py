"""What an unfinished run has done so far, so that the same run can go on and a different one cannot."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from expertflow_quant.checkpoint.errors import ResumeError
from expertflow_quant.checkpoint.files import json_bytes, read_json, write_durably

JOURNAL_FOLDER = ".journal"
_JOB = "job"
_ABSENT = "not set"


class Journal:
    """The folder ``.journal`` in an unfinished checkpoint: the job (all that decides the bytes), an entry a
    file, and ``scratch``, a folder for what the run wants to find again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / JOURNAL_FOLDER

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def exists(self) -> bool:
        return self._path(_JOB).is_file()

    def begin(self, job: Mapping[str, object]) -> None:
        """Starts the journal, or goes on with one of the same job. Raises ResumeError saying what differs."""
        if not self.exists:
            write_durably(self._path(_JOB), [json_bytes(job)])
            return
        before = read_json(self._path(_JOB))
        differences = _differences(before if isinstance(before, dict) else {}, json.loads(json_bytes(job)))
        if differences:
            raise ResumeError(
                f"{self.folder.parent} holds an unfinished run with other arguments: "
                f"{'; '.join(differences)}: run it again with its own arguments to go on, give --overwrite "
                f"to start anew, or choose another folder"
            )

    def entry(self, name: str) -> object | None:
        """What ``record`` noted under this name, or None."""
        path = self._path(name)
        return read_json(path) if path.is_file() else None

    def record(self, name: str, value: object) -> None:
        """Notes, durably, that a file is finished."""
        write_durably(self._path(name), [json_bytes(value)])

    def noted_files(self) -> set[str]:
        """Names of the files that entries are about."""
        if not self.folder.is_dir():
            return set()
        values = [read_json(path) for path in self.folder.glob("*.json") if path != self._path(_JOB)]
        return {
            str(value["file"]) for value in values if isinstance(value, dict) and isinstance(value.get("file"), str)
        }

    def is_of(self, job: Mapping[str, object]) -> bool:
        """Whether there is a journal of just this job."""
        return self.exists and read_json(self._path(_JOB)) == json.loads(json_bytes(job))

    def forget(self) -> None:
        """Empties the journal, the job first; its folder stays and marks the checkpoint as ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(_JOB).unlink(missing_ok=True)
        self._remove_scratch()
        for path in self.folder.iterdir():
            path.unlink()

    def remove(self) -> None:
        """Removes the journal, the job last, so that a half-removed one still says whose it was."""
        if self.folder.is_dir():
            self._remove_scratch()
            for path in sorted(self.folder.iterdir(), key=lambda path: path == self._path(_JOB)):
                path.unlink()
            self.folder.rmdir()

    def _remove_scratch(self) -> None:
        if self.scratch.is_dir():
            shutil.rmtree(self.scratch)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [
        f"{key} was {_shown(before.get(key, _ABSENT))}, now {_shown(now.get(key, _ABSENT))}"
        for key in sorted({*before, *now})
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
