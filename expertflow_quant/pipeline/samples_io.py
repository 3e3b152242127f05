"""Calibration samples from disk, or the generated ones.

A folder holds ``*.json`` and ``*.jsonl`` files (found below it too); each JSON value or line is a sample
``{"messages": [{"role", "content"}]}``, content being text or a list of ``{"type": "text", "text": ...}`` and
``{"type": "image", "image": "relative/path.png"}``. A parquet file has a column ``messages`` (the same list,
as a list or as JSON text) and, where there are images, a column ``images``: a list of bytes or of structs
with a ``bytes`` field, which fill the image parts of the messages in order.
"""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.pipeline.batches import CalibrationSample

ROLES = ("system", "user", "assistant")


def load_samples(path: Path | str, limit: int | None = None) -> list[CalibrationSample]:
    """The first ``limit`` samples in a folder or parquet file, files in name order.

    Raises ExpertFlowError naming the file and the sample that cannot be read, or when there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = _from_folder(path)
    elif path.suffix == ".parquet" and path.is_file():
        found = _from_parquet(path)
    else:
        raise ExpertFlowError(f"{path} is neither a folder nor a parquet file: give one that holds samples")
    samples = list(islice(found, limit))
    if not samples:
        raise ExpertFlowError(f'{path} holds no samples: write {{"messages": [...]}} into *.jsonl files there')
    return samples


def generated_samples(count: int, seed: int = 0) -> list[CalibrationSample]:
    """Charts and documents, half and half, each question with its answer as the assistant's turn."""
    from expertflow_quant.samples import make_items

    charts = make_items("chart", "calibration", count - count // 2, seed=seed)
    documents = make_items("document", "calibration", count // 2, seed=seed)
    return [
        {"messages": [*item.messages, {"role": "assistant", "content": item.answers[0]}]}
        for item in [*charts, *documents]
    ]


def _from_folder(folder: Path) -> Iterator[CalibrationSample]:
    for path in sorted(path for path in folder.rglob("*.json*") if path.suffix in (".json", ".jsonl")):
        for number, value in _values(path):
            yield _sample(value, f"{path}, sample {number}", path.parent, None)


def _values(path: Path) -> Iterator[tuple[int, object]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            # not splitlines: JSON texts may hold other characters that end lines
            lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        else:
            value = json.loads(text)
            yield from enumerate(value if isinstance(value, list) else [value])
            return
    except (OSError, ValueError) as error:
        raise ExpertFlowError(f"cannot read samples from {path}: {error}: correct or remove the file") from error
    for place, (number, line) in enumerate(lines):
        yield place, _json(line, f"{path}, line {number}", "it is")


def _from_parquet(path: Path) -> Iterator[CalibrationSample]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ExpertFlowError(f"reading {path} needs pyarrow: pip install expertflow-quant[parquet]") from error
    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if "messages" not in names:
            raise ExpertFlowError(f'{path} has no column "messages" (it has {", ".join(sorted(names))}): add it')
        columns = [name for name in ("messages", "images") if name in names]
        rows = (row for batch in file.iter_batches(64, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            where = f"{path}, row {number}"
            messages = row["messages"]
            value = _json(messages, where) if isinstance(messages, str) else messages
            yield _sample({"messages": value}, where, None, row.get("images") or [])
    except (OSError, ArrowException) as error:
        raise ExpertFlowError(f"cannot read samples from {path}: {error}: correct the file") from error


def _json(text: str, where: str, what: str = "messages are") -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ExpertFlowError(f"{where}: {what} not JSON ({error}): correct or remove it") from error


def _sample(value: object, where: str, folder: Path | None, images: Sequence[object] | None) -> CalibrationSample:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ExpertFlowError(f'{where}: a sample is {{"messages": [...]}} with at least one message: correct it')
    left = iter(images or ())
    made = [_message(message, where, folder, left) for message in messages]
    if next(left, None) is not None:
        raise ExpertFlowError(f"{where}: more images than image parts in its messages: correct it")
    return {"messages": made}


def _message(message: object, where: str, folder: Path | None, images: Iterator[object]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role not in ROLES or not isinstance(content, (str, list)):
        raise ExpertFlowError(f"{where}: a message has a role ({', '.join(ROLES)}) and a content: correct it")
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": [_part(part, where, folder, images) for part in content]}


def _part(part: object, where: str, folder: Path | None, images: Iterator[object]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if not isinstance(part, dict) or kind != "image":
        raise ExpertFlowError(f'{where}: a part is {{"type": "text", ...}} or {{"type": "image", ...}}: correct it')
    source = part.get("image") or next(images, None)
    return {"type": "image", "image": _image(source, where, folder)}


def _image(source: object, where: str, folder: Path | None) -> Image.Image:
    raw = source.get("bytes") if isinstance(source, dict) else source
    if isinstance(raw, str) and folder is not None:
        raw = folder / raw
    if not isinstance(raw, (bytes, Path)):
        raise ExpertFlowError(f"{where}: an image part has no image (a relative path, or bytes in images): add it")
    try:
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ExpertFlowError(f"{where}: cannot read an image: {error}: correct or remove the sample") from error
