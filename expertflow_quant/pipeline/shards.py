"""A model folder's safetensors shards: which tensors there are, and any one of them, or one slice, read
lazily."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import inner_path, read_json
from expertflow_quant.checkpoint.tensors import DTYPE_NAMES, TensorPlace, read_header

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Shards:
    """The tensors of one model folder, memory-mapped. Raises CheckpointError naming a shard that cannot be
    read."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, Any] = {}
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

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which a tensor is stored. Raises CheckpointError for one that torch has no name
        for."""
        name = self._places[key].dtype
        if name not in _DTYPES:
            raise CheckpointError(
                f"{self._file_of[key]}: {key} is {name}, which this build does not read: use a model in "
                f"bfloat16, float16 or float32"
            )
        return _DTYPES[name]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape with which a tensor is stored."""
        return self._places[key].shape

    def read(self, key: str, index: int | None = None) -> Tensor:
        """A whole tensor, or the slice ``[index : index + 1]`` of its first dimension, on the CPU as it is
        stored."""
        path = self._file_of[key]
        try:
            if path not in self._open:
                self._open[path] = safe_open(str(path), framework="pt")
            if index is None:
                tensor: Tensor = self._open[path].get_tensor(key)
                return tensor
            part: Tensor = self._open[path].get_slice(key)[index : index + 1]
            return part
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {key} from {path}: {error}: download the file again") from error

    def close(self) -> None:
        """Lets go of the mappings; they are made again when they are needed."""
        self._open.clear()

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
