"""What made a figure: command, device, versions, commit; and a fingerprint that tells one model from
another."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.metrics import METRICS_VERSION

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "expertflow-quant")
_WHOLE_FILE = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


def provenance(module: str, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """How a results file was made. No date: the same inputs must give the same file, but for the times in
    it."""
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions(),
        "metrics_version": METRICS_VERSION,
        "git": git_state(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, by default of the packages that can change an answer."""
    return {name: _version(name) for name in packages}


def device_name(device: str) -> str:
    """A device as its maker calls it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the checkout and whether tracked files differ from it; None outside a repository."""
    here = folder or Path(__file__).parent
    commit, changes = _git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain", "-uno")
    return None if commit is None else {"commit": commit, "changed": bool(changes)}


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over a model folder: small files whole, large ones by size and 64 samples of 16 KiB.

    Reads at most a megabyte a file, so it tells models apart without hashing tens of gigabytes; it is no
    check against damage.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is no model: give the folder of a model or checkpoint")
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}:{path.stat().st_size}\n".encode())
        _add_content(digest, path)
    return digest.hexdigest()


def short_path(path: Path) -> str:
    """A path as it can be said from here; outside the working folder as it was given."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _add_content(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            digest.update(file.read())
            return
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
