"""safetensors files written as a stream: one tensor in memory at a time, data aligned for direct reads.

The file is an ordinary safetensors file. Unlike the library's writer this one keeps the given order, pads
the header with spaces so that the data begins at a multiple of 256 bytes, and hashes the bytes as they pass.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import Chunk, write_durably

DATA_ALIGNMENT = 256
MAX_HEADER = 100_000_000
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written: what it will be, and ``read`` to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def ready(cls, name: str, tensor: Tensor) -> "PendingTensor":
        """One that is in memory already."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file: first byte in the file, dtype's safetensors name, shape,
    bytes."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_tensors(path: Path, tensors: Sequence[PendingTensor], sync: bool = True) -> tuple[int, str]:
    """Writes a safetensors file in the given order; returns (bytes, sha256 hex). Equal tensors give equal
    bytes. ``sync`` as in ``write_durably``.

    Raises CheckpointError when a tensor is not what was announced, has a dtype safetensors lacks, or the
    disk refuses.
    """

    def chunks() -> Iterator[Chunk]:
        yield _header(tensors)
        for pending in tensors:
            yield _bytes_of(pending, path)

    return write_durably(path, chunks(), sync)


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Tensor name to place in the file. Raises CheckpointError for a file that is not whole safetensors."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(_damaged(path, f"its header claims {length} bytes of {size}"))
            header = json.loads(file.read(length))
        places = {str(name): _place(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}: restore the file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_damaged(path, f"its header does not parse ({error})")) from error
    end = max((place.offset + place.nbytes for place in places.values()), default=8 + length)
    if end != size:
        raise CheckpointError(_damaged(path, f"its tensors end at byte {end} of {size}"))
    return places


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that ``write_tensors`` wrote, in memory. Raises CheckpointError for a damaged file."""
    tensors = {}
    for name, place in read_header(path).items():
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}: restore the file") from error
        tensors[name] = data.view(DTYPES[place.dtype]).view(place.shape)
    return tensors


def _header(tensors: Sequence[PendingTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for pending in tensors:
        if pending.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {pending.name}: safetensors holds no {pending.dtype}: convert it first")
        entries[pending.name] = {
            "dtype": DTYPE_NAMES[pending.dtype],
            "shape": list(pending.shape),
            "data_offsets": [end, end + pending.nbytes],
        }
        end += pending.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(pending: PendingTensor, path: Path) -> Chunk:
    tensor = pending.read().detach().cpu().contiguous()
    if tensor.dtype != pending.dtype or tuple(tensor.shape) != pending.shape:
        raise CheckpointError(
            f"tensor {pending.name} for {path} is {tensor.dtype} {tuple(tensor.shape)}, announced as "
            f"{pending.dtype} {pending.shape}: the model's files changed while they were read: run again "
            f"with --overwrite"
        )
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data) if tensor.numel() else b""


def _place(entry: dict[str, list[int]], data_start: int) -> TensorPlace:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError(f"offsets {begin}, {end}")
    return TensorPlace(data_start + begin, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), end - begin)


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}: copy it again or quantize again with --overwrite"
