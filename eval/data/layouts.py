"""From a path to rows, whatever the layout: it is told by what lies there, never by a data set's name.

| layout | what is given |
| --- | --- |
| hub | a folder with ``*.parquet`` (README with ``configs:`` or not), or a hub cache folder with ``snapshots/`` |
| parquet | one ``*.parquet`` file, or a glob of them |
| save_to_disk | a folder that ``datasets`` saved: one split, or several |
| json | the authors' JSON files beside their images: ChartQA's, RRC's |
| tsv | VLMEvalKit's table with images in base64 (or, ``*_local.tsv``, their paths) |
"""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data.columns import LABELS, Columns
from eval.data.errors import DataError
from eval.data.hub import Splits, by_split, choose, hub_splits, newest_snapshot
from eval.data.images import ImageFolder
from eval.data.original import find_files, json_rows, tsv_columns, tsv_rows
from eval.data.sets import DataSet
from eval.data.tables import saved_splits, table_files

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Rows of one file, in order, with what their columns mean and where the images lie that they name."""

    columns: Columns
    labels: Mapping[str, tuple[str, ...]]
    folder: ImageFolder
    rows: Iterator[Row]


@dataclass(frozen=True)
class Source:
    """All rows of one split of a data set at a path. ``split`` is "" where no name tells it."""

    layout: str
    split: str
    parts: Sequence[Part]


def open_source(data_set: DataSet, path: Path | str) -> Source:
    """Find out the layout and begin to read. Raises DataError if nothing is there or it cannot be understood."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _from_folder(data_set, newest_snapshot(path))
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise DataError(f"{data_set.title}: there is nothing at {path}: {data_set.remedy}")
    return _from_files(data_set, files)


def _from_folder(data_set: DataSet, folder: Path) -> Source:
    if (saved := saved_splits(folder)) is not None:
        return _tables(data_set, "save_to_disk", saved, folder)
    if (hub := hub_splits(folder, data_set.configs, data_set.foreign_configs)) is not None:
        return _tables(data_set, "hub", hub, folder)
    if files := find_files(folder, data_set.json_files):
        return _texts(files, folder)
    if files := find_files(folder, data_set.tsv_files):
        return _texts(files[:1], folder)
    raise DataError(
        f"{data_set.title}: {folder} holds no *.parquet, no saved data set, no JSON file and no TSV file of it: "
        f"{data_set.remedy}"
    )


def _from_files(data_set: DataSet, files: Sequence[Path]) -> Source:
    kinds = {path.suffix.lower() for path in files}
    folder = files[0].parent
    if kinds <= {".parquet"} or kinds <= {".arrow"}:
        return _tables(data_set, "parquet" if kinds == {".parquet"} else "save_to_disk", by_split(files), folder)
    if kinds <= {".json", ".tsv"}:
        return _texts(files, folder)
    raise DataError(
        f"{data_set.title}: {files[0]} is of no known layout (*.parquet, *.arrow, *.json, *.tsv): {data_set.remedy}"
    )


def _tables(data_set: DataSet, layout: str, splits: Splits, folder: Path) -> Source:
    split = choose(list(splits), data_set.splits, f"{data_set.title}: {folder} has splits")
    images = ImageFolder((folder,))
    tables = table_files(splits[split])
    return Source(layout, split, [Part(t.columns, t.labels, images, t.rows(images)) for t in tables])


def _texts(files: Sequence[Path], folder: Path) -> Source:
    parts, layouts = [], set()
    for path in files:
        layouts.add(path.suffix[1:].lower())
        images = ImageFolder((path.parent, folder))
        if path.suffix.lower() == ".tsv":
            names, rows = tsv_columns(path), tsv_rows(path)
        else:
            values = json_rows(path)
            names, rows = list(dict.fromkeys(name for row in values for name in row)), iter(values)
        parts.append(Part(Columns.detect(names, str(path)), LABELS, images, rows))
    return Source(" and ".join(sorted(layouts)), "", parts)
