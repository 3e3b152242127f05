"""Layouts of text files: the authors' JSON beside a folder of images, and VLMEvalKit's TSV with images in base64."""

import ast
import base64
import binascii
import csv
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from eval.data.errors import DataError
from eval.data.images import HeldImage, image_key

EDITION = re.compile(r"_v[0-9.]+(_withQT)?$")
ENCODING = "utf-8-sig"
"""UTF-8, with or without the mark that Windows programs put before it."""
REFERENCE_LENGTH = 64
"""A TSV cell this short is no image but the index of the row that holds it."""


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The files whose whole name matches, ordered by ``human`` before ``augmented``, then by name; of one folder only,
    the highest up, and of two editions of a file ("val_v1.0.json", "val_v1.0_withQT.json") the later one."""
    found = [path for path in folder.rglob("*") if re.fullmatch(pattern, path.name, re.IGNORECASE) and path.is_file()]
    if not found:
        return []
    first = min(found, key=lambda path: (len(path.parts), str(path))).parent
    editions = {EDITION.sub("", p.stem): p for p in sorted(found) if p.parent == first}
    return sorted(editions.values(), key=lambda path: ("human" not in path.name, path.name))


def json_rows(path: Path) -> list[dict[str, Any]]:
    """ChartQA's list of questions, or RRC's ``{"data": [...]}``; the file's name tells ChartQA's split. A row that is
    no object stays as an empty one, which is found damaged."""
    try:
        value = json.loads(path.read_text(encoding=ENCODING))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}): download it again") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} holds no questions: it must be a list of objects or {{"data": [...]}}')
    split = value.get("dataset_split") if isinstance(value, dict) else path.stem
    return [{"split": split} | (row if isinstance(row, dict) else {}) for row in rows]


def tsv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a TSV: texts are taken as they stand, a list of texts where a cell spells one, null where it is empty.

    An image cell holds base64, or the index of an earlier row that holds it. Equal images are held once.
    """
    csv.field_size_limit(sys.maxsize)
    by_index: dict[str, HeldImage] = {}
    by_key: dict[str, HeldImage] = {}
    with _table(path) as file:
        reader = csv.DictReader(file, delimiter="\t", restkey="more")
        for cells in reader:
            row: dict[str, Any] = {name: _cell(text) for name, text in cells.items() if isinstance(text, str)}
            if text := cells.get("image"):
                image = _image(text, by_index)
                image = by_key.setdefault(image_key(image.data), image)
                row["image"] = by_index[str(cells.get("index"))] = image
            yield row


def tsv_columns(path: Path) -> list[str]:
    """The names in the first line."""
    with _table(path) as file:
        return next(csv.reader(file, delimiter="\t"), [])


@contextmanager
def _table(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding=ENCODING, newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path} ({error}): it must be a table in UTF-8, so download it again") from error


def _image(text: str, by_index: dict[str, HeldImage]) -> HeldImage:
    if len(text) <= REFERENCE_LENGTH and text in by_index:
        return by_index[text]
    try:
        return HeldImage(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return HeldImage(text.encode())  # no base64: found to be no image when it is checked


def _cell(text: str) -> object:
    if text.startswith("["):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        if isinstance(value, list) and all(isinstance(member, str) for member in value):
            return value
    return text or None
