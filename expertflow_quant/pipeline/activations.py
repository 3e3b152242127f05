"""Activations of calibration data on disk: what a block gave to the next, by batch, and one layer's inputs.

The outputs of a block are whole when its state file, written last, is there with their checksums; a run that was
killed finds it again and goes on behind that block. One layer's inputs lie in a file that is mapped: gathering an
expert's rows brings in what it needs, and the pages are given back again and again.
"""

import contextlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import hash_file, inner_path, json_bytes, read_json, write_durably
from expertflow_quant.checkpoint.tensors import PendingTensor, read_tensors, write_tensors

KEPT_BYTES = 1 << 26  # of a mapped file that may stay in memory


@dataclass(frozen=True)
class Stored:
    """Tensors in a file, their order, and how they made up a value: see ``structure_of``."""

    file: str
    structure: Any
    sha256: str


class Activations:
    """A folder of activations, ``durable`` if a later run is to find them there. Raises CheckpointError naming the
    file when the disk is full or refuses."""

    def __init__(self, folder: Path, durable: bool = True) -> None:
        self._folder, self._durable = folder, durable

    def save(self, name: str, tensors: Sequence[Tensor], structure: Any = None, sync: bool = True) -> Stored:
        """Writes tensors under a name, instead of what had that name; ``sync``: for a later run too."""
        file = f"{name}.safetensors"
        pending = [PendingTensor.ready(f"{number:04d}", tensor) for number, tensor in enumerate(tensors)]
        return Stored(file, structure, write_tensors(self._folder / file, pending, sync and self._durable)[1])

    def load(self, stored: Stored) -> list[Tensor]:
        """The tensors, on the CPU."""
        return [tensor for _, tensor in sorted(read_tensors(self._folder / stored.file).items())]

    def commit(self, block: int, outputs: Sequence[Stored]) -> None:
        """Notes that the outputs of a block are whole, one of each batch."""
        # "outputs" were written without what blocks share, so a run of that time makes its activations again
        state = [{"file": each.file, "structure": each.structure, "sha256": each.sha256} for each in outputs]
        write_durably(self._state(block), [json_bytes({"made": state})], self._durable)

    def resume(self, before: int, batches: int) -> tuple[int, list[Stored]] | None:
        """The last block before block ``before`` whose outputs are whole, with them; everything else is removed."""
        for block in sorted(self._blocks(), reverse=True):
            if block < before and (outputs := self._outputs(block)) is not None and len(outputs) == batches:
                self._keep_only({each.file for each in outputs} | {self._state(block).name})
                return block, outputs
        self._keep_only(set())
        return None

    def drop(self, block: int, outputs: Sequence[Stored]) -> None:
        """Removes the outputs of a block, the note that they are whole first."""
        self._state(block).unlink(missing_ok=True)
        for each in outputs:
            (self._folder / each.file).unlink(missing_ok=True)

    def rows(self) -> "MappedRows":
        """A new file for the rows of one layer."""
        return MappedRows(self._folder)

    def _outputs(self, block: int) -> list[Stored] | None:
        try:
            state: Any = read_json(self._state(block))
            outputs = [Stored(each["file"], each["structure"], each["sha256"]) for each in state["made"]]
            intact = all(hash_file(inner_path(self._folder, each.file)) == each.sha256 for each in outputs)
        except (CheckpointError, KeyError, TypeError):
            return None
        return outputs if intact else None

    def _blocks(self) -> list[int]:
        names = [path.stem.removeprefix("block-") for path in self._folder.glob("block-*.json")]
        return [int(name) for name in names if name.isdecimal()]

    def _state(self, block: int) -> Path:
        return self._folder / f"block-{block:05d}.json"

    def _keep_only(self, names: set[str]) -> None:
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in names:
                path.unlink()


class MappedRows:
    """Rows ``[T, H]``, added part by part to a file without a name, then mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._touched = folder, 0
        self._like: Tensor | None = None
        with self._named_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(prefix="rows-", dir=folder)  # noqa: SIM115  # lives as long as the rows

    def add(self, part: Tensor) -> None:
        """Adds rows ``[n, H]``, on the CPU."""
        self._like = part[:0]
        with self._named_errors():
            self._file.write(part.contiguous().view(torch.uint8).numpy().data)

    def tensor(self) -> Tensor:
        """All rows; nothing may be added any more."""
        with self._named_errors():
            self._file.flush()
        if self._like is None or self._file.tell() == 0:
            raise ValueError("no rows were added")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._file.close()  # the mapping keeps it
        return torch.frombuffer(self._map, dtype=self._like.dtype).view(-1, self._like.shape[1])

    def used(self, nbytes: int) -> None:
        """So many bytes were read: gives the pages back when too many may have come in."""
        self._touched += nbytes
        if self._touched > KEPT_BYTES and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write activations into {self._folder}: {error.strerror or error}: make room or choose another "
                f"folder; the same command run again goes on from the last finished layer"
            ) from error


def structure_of(value: Any, tensors: list[Tensor]) -> Any:
    """A block's output as JSON, its tensors put into the list: {"tensor": place}, {"value": ...}, {"tuple": [...]},
    {"list": [...]}. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [structure_of(each, tensors) for each in value]}
    raise TypeError(f"a {type(value).__name__}")


def value_of(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """The value that ``structure_of`` took apart."""
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    parts = [value_of(each, tensors) for each in content]
    return tuple(parts) if kind == "tuple" else parts
