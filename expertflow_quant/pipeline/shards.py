"""A model folder's safetensors shards: which tensors there are, and any one of them, or one slice, read
lazily.

Files are read, not mapped: the pages of a mapping count as the process's memory until it is closed, so that
reading a model through one would look, to a limit on memory, as if all of it were held.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import inner_path, read_json
from expertflow_quant.checkpoint.tensors import DTYPES, TensorPlace, read_header

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class Shards:
    """The tensors of one model folder. Raises CheckpointError naming a shard that cannot be read."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()
        self._file_of: dict[str, Path] = {}
        self._places: dict[str, TensorPlace] = {}
        for path in self._files():
            for key, place in read_header(path).items():
                self._file_of[key], self._places[key] = path, place

    @property
    def keys(self) -> list[str]:
        return list(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The shards, by name."""
        return sorted(set(self._file_of.values()))

    def file(self, key: str) -> Path:
        """The shard that holds a tensor."""
        return self._file_of[key]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which a tensor is stored. Raises CheckpointError for one that torch has no name
        for."""
        name = self._places[key].dtype
        if name not in DTYPES:
            raise CheckpointError(
                f"{self._file_of[key]}: {key} is {name}, which this build does not read: use a model in "
                f"bfloat16, float16 or float32"
            )
        return DTYPES[name]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape with which a tensor is stored."""
        return self._places[key].shape

    def read(self, key: str, index: int | None = None) -> Tensor:
        """A whole tensor, or the slice ``[index : index + 1]`` of its first dimension, on the CPU as it is
        stored. Raises CheckpointError naming tensor and file where the file ends early or cannot be read."""
        if index is not None:
            return self.read_rows(key, [index])
        place = self._places[key]
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        self._fill(data, key, place.offset)
        return data.view(self.dtype(key)).view(place.shape)

    def read_rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Some entries of a tensor's first dimension, in the given order: ``[len(rows), ...]``."""
        place = self._places[key]
        each = place.nbytes // max(place.shape[0], 1)
        data = torch.empty(len(rows), each, dtype=torch.uint8)
        for row, at in zip(data, rows, strict=True):
            if not 0 <= at < place.shape[0]:
                raise CheckpointError(f"{key} has {place.shape[0]} entries, not one {at}: correct config.json")
            self._fill(row, key, place.offset + at * each)
        return data.view(-1).view(self.dtype(key)).view(len(rows), *place.shape[1:])

    def close(self) -> None:
        """Closes the files; they are opened again when they are needed."""
        while self._open:
            self._open.popitem()[1].close()

    def _fill(self, data: Tensor, key: str, offset: int) -> None:
        """Reads ``data`` (uint8, contiguous) from the file that holds ``key``."""
        path = self._file_of[key]
        left = memoryview(data.numpy().data) if data.numel() else memoryview(b"")
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = path.open("rb", buffering=0)
                self._open[path].seek(offset)
                while got := self._open[path].readinto(left):  # type: ignore[attr-defined]  # unbuffered
                    left = left[got:]
        except OSError as error:
            raise CheckpointError(
                f"cannot read {key} from {path}: {error.strerror or error}: check the disk or download the file "
                f"again; what is finished stays, and the same command goes on from there"
            ) from error
        if len(left):
            raise CheckpointError(
                f"cannot read {key} from {path}: the file ends {len(left)} bytes early: download it again; what is "
                f"finished stays, and the same command goes on from there"
            )

    def _files(self) -> list[Path]:
        index = self.folder / WEIGHTS_INDEX
        if index.is_file():
            value = read_json(index)
            weight_map = value.get("weight_map") if isinstance(value, dict) else None
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f'{index} has no "weight_map": download the file again')
            return [self._shard(name) for name in sorted(set(weight_map.values()))]
        return [self._shard(WEIGHTS_FILE)]

    def _shard(self, name: str) -> Path:
        path = inner_path(self.folder, name)
        if not path.is_file():
            found = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f" (pickle files such as {found[0]} are not read: convert them)" if found else ""
            raise CheckpointError(f"{path} is missing{hint}: weights are read from safetensors: download it again")
        return path
