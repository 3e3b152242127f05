"""Durable files: written under a temporary name, synced, renamed; hashed while they are written; never
outside."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from expertflow_quant.checkpoint.errors import CheckpointError

PARTIAL = ".partial"
_HASH_BLOCK = 1 << 22

Chunk = bytes | memoryview


def write_durably(path: Path, chunks: Iterable[Chunk], sync: bool = True) -> tuple[int, str]:
    """Writes ``chunks`` to ``path`` so that the name only ever shows the whole file; returns (bytes, sha256
    hex). Without ``sync`` only as long as the system does not go down.

    Raises CheckpointError naming the file when the disk is full or refuses.
    """
    partial = path.with_name(path.name + PARTIAL)
    digest, nbytes = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                nbytes += len(chunk)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # its bytes may be what others lack
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} (stopped after {nbytes} bytes): {error.strerror or error}: make room or "
            f"choose another folder; the same command run again goes on from the last finished layer"
        ) from error
    return nbytes, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file. Raises CheckpointError naming it when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}: restore the file") from error
    return digest.hexdigest()


def json_bytes(value: object) -> bytes:
    """One spelling of a JSON value: sorted keys, two spaces, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> object:
    """The JSON value in ``path``. Raises CheckpointError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}: restore the file") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): restore the file or quantize again") from error


def inner_path(folder: Path, name: object) -> Path:
    """``folder / name`` for a relative name with forward slashes that stays inside; CheckpointError for
    any other."""
    pure = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    plain = isinstance(name, str) and str(pure) == name and "\\" not in name and ":" not in name and "\0" not in name
    if not plain or pure.is_absolute() or ".." in pure.parts or pure == PurePosixPath("."):
        raise CheckpointError(
            f"file name {name!r} in {folder} is refused: a checkpoint names files inside its own folder, "
            f"relative and with forward slashes: get the checkpoint from a source you trust"
        )
    return folder / pure
