"""Rows of parquet files and of folders that ``datasets`` saved, image by image: no more than one row group of images
(parquet) or none at all (memory-mapped arrow) is in memory at a time."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.data.columns import LABELS, Columns
from eval.data.errors import DamagedRowError, DataError
from eval.data.images import CellImage, ImageFolder

Row = dict[str, Any]
STATE, DICT = "state.json", "dataset_dict.json"


class ParquetTable:
    """One parquet file."""

    def __init__(self, path: Path) -> None:
        _, parquet = _pyarrow(path)
        self.path = path
        self._file = _read(path, partial(parquet.ParquetFile, path))
        self.columns = Columns.detect(self._file.schema_arrow.names, str(path))
        self.labels = class_labels(self._file.schema_arrow)
        self._images: tuple[int, Any] = (-1, None)

    def rows(self, folder: ImageFolder) -> Iterator[Row]:
        """All rows in order; a row's image is read when it is asked for."""
        for group in range(self._file.num_row_groups):
            light = _read(self.path, partial(self._light, group))
            for i, row in enumerate(light):
                yield row | {self.columns.image: CellImage(partial(self._image, group, i), folder)}

    def _light(self, group: int) -> list[Row]:
        return self._file.read_row_group(group, columns=self.columns.light).to_pylist()

    def _image(self, group: int, row: int) -> object:
        if self._images[0] != group:
            reading = partial(self._file.read_row_group, group, columns=[self.columns.image])
            try:
                self._images = (group, _read(self.path, reading).column(0))
            except DataError as error:  # the rows stand, so they are asked nothing and score 0
                told = f"its image cannot be read, {self.path.name} is damaged there: download it again"
                raise DamagedRowError(told) from error
        return self._images[1][row].as_py()


class ArrowTable:
    """One memory-mapped arrow file, of the stream or the file format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = _read(path, partial(_mapped, path))
        self.columns = Columns.detect(self._table.schema.names, str(path))
        self.labels = class_labels(self._table.schema)

    def rows(self, folder: ImageFolder) -> Iterator[Row]:
        """All rows in order; a row's image is read when it is asked for."""
        images, light, row = self._table[self.columns.image], self._table.select(self.columns.light), 0
        for batch in light.to_batches(max_chunksize=256):
            for values in _read(self.path, batch.to_pylist):
                yield values | {self.columns.image: CellImage(partial(_cell, images, row), folder)}
                row += 1


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The arrow files of each split of a folder that ``save_to_disk`` wrote; None for any other folder."""
    if (folder / DICT).is_file():
        names = _json(folder / DICT).get("splits", [])
        return {name: _arrow_files(folder / name) for name in names}
    if (folder / STATE).is_file():
        return {str(_json(folder / STATE).get("_split") or ""): _arrow_files(folder)}
    return None


def class_labels(schema: Any) -> Mapping[str, tuple[str, ...]]:
    """By column, the names of its class numbers, from what ``datasets`` writes beside a schema."""
    found = dict(LABELS)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found |= {n: tuple(f["names"]) for n, f in features.items() if isinstance(f, dict) and "names" in f}
    except (KeyError, TypeError, ValueError):
        pass  # written by something else: the known names remain
    return found


def _arrow_files(folder: Path) -> list[Path]:
    named = [folder / entry["filename"] for entry in _json(folder / STATE).get("_data_files", [])]
    return named or sorted(folder.glob("*.arrow"))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {path} ({error}): save the data set again") from error


def _mapped(path: Path) -> Any:
    arrow, _ = _pyarrow(path)
    with arrow.memory_map(str(path)) as source:
        try:
            return arrow.ipc.open_stream(source).read_all()
        except arrow.ArrowInvalid:
            source.seek(0)
            return arrow.ipc.open_file(source).read_all()


def _cell(column: Any, row: int) -> object:
    return column[row].as_py()


def _read(path: Path, reading: Callable[[], Any]) -> Any:
    arrow, _ = _pyarrow(path)
    try:
        return reading()
    except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:
        raise DataError(f"cannot read {path} ({' '.join(str(error).split())}): download it again") from error


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install expertflow-quant[parquet]") from error
    return pyarrow, parquet


def table_files(files: Sequence[Path]) -> list[ParquetTable | ArrowTable]:
    """Open parquet and arrow files, told apart by their suffix."""
    return [ArrowTable(path) if path.suffix == ".arrow" else ParquetTable(path) for path in files]
