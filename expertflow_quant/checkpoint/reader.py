"""Reads a finished checkpoint: its manifest, and any expert's record straight from the mapped file."""

from pathlib import Path

import torch
from torch import Tensor

from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.checkpoint.files import hash_file, inner_path
from expertflow_quant.checkpoint.manifest import FileEntry, LayerEntry, Manifest
from expertflow_quant.checkpoint.tensors import DATA_ALIGNMENT, read_header
from expertflow_quant.checkpoint.writer import record_name


class CheckpointReader:
    """A checkpoint folder. Raises CheckpointError at once when a file is missing or has the wrong size.

    Records are views into private (copy-on-write) mappings: nothing is read before it is touched, and
    writing into one never reaches the file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self._maps: dict[int, tuple[Tensor, list[int]]] = {}
        self.verify(full=False)

    @property
    def layers(self) -> list[LayerEntry]:
        """MoE layers in model order."""
        return list(self.manifest.layers)

    def record(self, layer: int, expert: int) -> Tensor:
        """The record of one expert, uint8 ``[nbytes]`` on the CPU, memory-mapped, starting on a 256-byte
        boundary."""
        mapped, offsets = self._mapped(layer)
        start = offsets[expert]
        return mapped[start : start + self.manifest.layers[layer].experts[expert].nbytes]

    def verify(self, full: bool = False) -> None:
        """Sizes of all files, and with ``full`` their sha256. Raises CheckpointError naming every file at
        fault."""
        faults = [fault for entry in self.manifest.all_files if (fault := self._fault(entry, full))]
        if faults:
            raise CheckpointError("; ".join(faults) + ": copy the checkpoint again or quantize again with --overwrite")
        for layer in range(len(self.manifest.layers)) if full else ():
            self._mapped(layer)

    def _fault(self, entry: FileEntry, full: bool) -> str | None:
        path = inner_path(self.folder, entry.file)
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry.nbytes:
            return f"{path} has {size} bytes, the manifest says {entry.nbytes}"
        if full and (found := hash_file(path)) != entry.sha256:
            return f"{path} has sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}..."
        return None

    def _mapped(self, layer: int) -> tuple[Tensor, list[int]]:
        if layer not in self._maps:
            entry = self.manifest.layers[layer]
            path = inner_path(self.folder, entry.file.file)
            offsets = _record_offsets(path, entry)
            self._maps[layer] = (_map_file(path, entry.file.nbytes), offsets)
        return self._maps[layer]


def _map_file(path: Path, nbytes: int) -> Tensor:
    try:
        return torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(f"cannot map {path}: {error}: restore the file") from error


def _record_offsets(path: Path, layer: LayerEntry) -> list[int]:
    places = read_header(path)
    offsets = []
    for index, expert in enumerate(layer.experts):
        place = places.get(record_name(index))
        if place is None or place.dtype != "U8" or place.nbytes != expert.nbytes or place.offset % DATA_ALIGNMENT:
            raise CheckpointError(
                f"{path}: expert {index} is {place}, wanted {expert.nbytes} bytes of U8 from a multiple of "
                f"{DATA_ALIGNMENT}: quantize again with --overwrite"
            )
        offsets.append(place.offset)
    return offsets
