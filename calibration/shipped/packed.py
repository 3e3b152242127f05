"""A model folder at half its size, and back: `python -m calibration.shipped.packed pack|expand FOLDER OUT`.

The twin with as many parameters as the MoE has in all would take as much of the repository as that. So its matrices are
kept as int8 with a scale for every row, rounded to nearest, and the model that is judged is the one that these expand
to, in bfloat16, an ordinary folder that transformers loads.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, PACKED = "model.safetensors", "model-int8.safetensors"
CODES, SCALES = ".codes", ".scales"
LARGEST = 127


def pack(folder: Path, out: Path) -> None:
    """Write ``folder`` with its matrices as int8 to ``out``; other tensors and files as they are."""
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / WEIGHTS).items():
        if value.ndim < 2:
            tensors[name] = value
            continue
        rows = value.float().flatten(1)
        scales = (rows.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        tensors[name + CODES] = (rows / scales).round().to(torch.int8).view(value.shape)
        tensors[name + SCALES] = scales[:, 0]
    _copy_others(folder, out, WEIGHTS)
    save_file(tensors, out / PACKED, {"format": "pt"})


def expand(folder: Path, out: Path) -> None:
    """Write what ``pack`` made of a model to ``out`` as a model in bfloat16."""
    packed = load_file(folder / PACKED)
    tensors: dict[str, Tensor] = {}
    for name, value in packed.items():
        if name.endswith(CODES):
            plain = name.removesuffix(CODES)
            scales = packed[plain + SCALES].view(-1, *[1] * (value.ndim - 1))
            tensors[plain] = (value.float() * scales).to(torch.bfloat16)
        elif not name.endswith(SCALES):
            tensors[name] = value
    _copy_others(folder, out, PACKED)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})


def _copy_others(folder: Path, out: Path, weights: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != weights:
            shutil.copy(file, out)


def main() -> None:
    """Pack or expand one folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", choices=("pack", "expand"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    (pack if args.what == "pack" else expand)(args.folder, args.out)


if __name__ == "__main__":
    main()
