"""lmms-eval's stock tasks that have a counterpart here, and how each is pointed at local files.

A stock task names a public data set; everything else of it (prompt, limit, metric) stays, and only where the data
comes from is overridden. Whatever the layout, the harness is given the very files that our own tasks read.
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data.hub import Splits, by_split, choose, hub_splits, newest_snapshot
from eval.data.sets import CHARTQA, DOCVQA, DataSet
from eval.data.tables import saved_splits, table_files
from expertflow_quant.formats import ExpertFlowError


class HarnessError(ExpertFlowError):
    """The harness is missing, failed, or disagrees about what was asked: the message names the remedy."""


@dataclass(frozen=True)
class StockTask:
    """A stock task: its name there, the split and the columns that it reads, the metric that scores an item."""

    name: str
    data_set: DataSet
    split: str
    columns: frozenset[str]
    score: str

    def override(self, path: Path) -> dict[str, Any]:
        """The task with its data taken from ``path``, in the form that ``simple_evaluate`` merges into the stock task.

        ``path``: a hub folder with parquet files, one such file or a glob, or what ``save_to_disk`` wrote. Raises
        HarnessError for files that the stock task cannot read, DataError for a path without any.
        """
        files = self.files(path)
        self._require_columns(files[0])
        builder = files[0].suffix[1:]
        told = {"data_files": {self.split: [str(file.resolve()) for file in files]}}
        return {"task": self.name, "dataset_path": builder, "dataset_name": None, "dataset_kwargs": told}

    def files(self, path: Path) -> list[Path]:
        """The parquet or arrow files that ``path`` means, in order."""
        splits = self._splits(path)
        files = splits[choose(list(splits), self.data_set.splits, f"{self.data_set.title}: {path} has splits")]
        if files and {file.suffix for file in files} in ({".parquet"}, {".arrow"}):
            return files
        raise HarnessError(
            f"{path} holds no tables of {self.data_set.title}, and lmms-eval's task {self.name} reads nothing else: "
            "give parquet files, or a data set that save_to_disk wrote"
        )

    def _splits(self, path: Path) -> Splits:
        if not path.is_dir():
            return by_split([path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True))))
        folder = newest_snapshot(path)
        return saved_splits(folder) or hub_splits(folder, self.data_set.configs) or {"": []}

    def _require_columns(self, file: Path) -> None:
        columns = table_files([file])[0].columns
        missing = self.columns - {columns.question, columns.answers, columns.image, *columns.others}
        if missing:
            raise HarnessError(
                f"{file} has no column {', '.join(sorted(missing))}, which lmms-eval's task {self.name} reads by that "
                f"name: give the public files of {self.data_set.sources[0]}, or leave the harness out"
            )


CHARTQA_TASK = StockTask(
    "chartqa", CHARTQA, "test", frozenset({"type", "question", "answer", "image"}), "relaxed_overall"
)
DOCVQA_TASK = StockTask("docvqa_val", DOCVQA, "validation", frozenset({"question", "answers", "image"}), "anls")
STOCK_TASKS = {task.data_set.name: task for task in (CHARTQA_TASK, DOCVQA_TASK)}
"""By the name that the data set has here."""
