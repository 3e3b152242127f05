"""What a predictor may see of a model besides ids and routes, recorded beside a trace: NAME.sight.safetensors.

=============  ============  ===========================================================================================
token_ids      int32 [N]     the trace's, to tell that both belong together
ahead          [N, L, D, W]  optional; uint8, or int16 from 256 experts on: the W experts that the router of layer l + d
                             puts first when it is given the router input of layer l, d = 1 .. D; num_experts where
                             there is no such layer
pictures       int8 [M, F]   optional; of every image token its input embedding x, known before the first layer runs, as
                             round(32 (x - center) @ basis), cut off at 127
center, basis  float32       [H] and [H, F], with pictures
=============  ============  ===========================================================================================

Metadata: ``format`` "expertflow-sight", ``version`` "1", ``num_experts``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.trace import PROMPT_IMAGE, RoutingTrace

FORMAT, VERSION = "expertflow-sight", "1"
STEP = 32.0


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions in which pictures are told apart: ``center`` float32 [H], ``basis`` float32 [H, F]."""

    center: Tensor
    basis: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """float32 [..., F] from input embeddings [..., H], each about of unit variance."""
        return (embeddings.float() - self.center) @ self.basis


@dataclass(frozen=True, eq=False)
class Sight:
    """``token_ids`` int32 [N]; ``ahead`` and ``codes`` (the file's ``pictures``) with its ``basis`` as in the file, or
    none. Raises ExpertFlowError for shapes that contradict each other."""

    token_ids: Tensor
    num_experts: int
    ahead: Tensor | None = None
    codes: Tensor | None = None
    basis: Basis | None = None

    def __post_init__(self) -> None:
        ahead, codes = self.ahead, self.codes
        if ahead is not None and (ahead.ndim != 4 or len(ahead) != len(self.token_ids)):
            raise ExpertFlowError(
                f"ahead is {tuple(ahead.shape)}, it must be ({len(self.token_ids)}, layers, distances, experts)"
            )
        if (codes is None) != (self.basis is None):
            raise ExpertFlowError("pictures and their basis belong together: give both or none")
        if codes is not None and self.basis is not None and codes.shape[1:] != self.basis.basis.shape[1:]:
            raise ExpertFlowError(
                f"pictures is {tuple(codes.shape)}, a basis of {tuple(self.basis.basis.shape)} makes "
                f"(image tokens, {self.basis.basis.shape[1]})"
            )

    @property
    def pictures(self) -> Tensor | None:
        """float32 [M, F] of all image tokens, in order."""
        return None if self.codes is None else self.codes.float() / STEP

    def pictures_of(self, trace: RoutingTrace, rows: slice) -> Tensor:
        """float32 [m, F] of the image tokens among ``rows`` of ``trace``."""
        if self.codes is None:
            raise ExpertFlowError("this sight has no pictures: record it with pictures")
        before = int((trace.kind[: rows.start] == PROMPT_IMAGE).sum())
        count = int((trace.kind[rows] == PROMPT_IMAGE).sum())
        return self.codes[before : before + count].float() / STEP

    def check(self, trace: RoutingTrace) -> "Sight":
        """This sight, if it was recorded with ``trace``. Raises ExpertFlowError otherwise."""
        images = int((trace.kind == PROMPT_IMAGE).sum())
        if not torch.equal(self.token_ids, trace.token_ids) or (self.codes is not None and len(self.codes) != images):
            raise ExpertFlowError(
                f"this sight of {len(self.token_ids)} tokens was recorded with another trace than the one of "
                f"{len(trace)} tokens, {images} of them images: record both together"
            )
        return self

    def save(self, path: Path | str) -> None:
        """Write the file, under its name only once it is whole."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        tensors = {"token_ids": self.token_ids, "ahead": self.ahead, "pictures": self.codes}
        if self.basis is not None:
            tensors |= {"center": self.basis.center, "basis": self.basis.basis}
        metadata = {"format": FORMAT, "version": VERSION, "num_experts": str(self.num_experts)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
            partial.write_bytes(save(kept, metadata))
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise ExpertFlowError(f"cannot write {path} ({error}): make room or choose another folder") from error

    @classmethod
    def load(cls, path: Path | str) -> "Sight":
        """Read a file back. Raises ExpertFlowError for one that is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise ExpertFlowError(f"cannot read {path} ({error}): record it again") from error
        experts, named = header.get("num_experts", ""), (header.get("format"), header.get("version"))
        if named != (FORMAT, VERSION) or "token_ids" not in found or not experts.isdecimal():
            raise ExpertFlowError(f"{path} is no sight of version {VERSION}: `python -m calibration sight` writes one")
        basis = Basis(found["center"], found["basis"]) if {"center", "basis"} <= found.keys() else None
        return cls(found["token_ids"], int(experts), found.get("ahead"), found.get("pictures"), basis)


def sight_path(trace: Path) -> Path:
    """Where the sight of a trace lies: beside it."""
    return trace.with_name(trace.stem + ".sight.safetensors")


def coded(pictures: Tensor) -> Tensor:
    """int8 codes of float pictures."""
    return (pictures * STEP).round().clamp(-127, 127).to(torch.int8)
