"""A process's memory over time, as Linux counts it: resident pages, those of files and those of its own apart."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertflow_quant.formats import ExpertFlowError

INTERVAL = 0.05  # seconds
_FIELDS = {"VmHWM": "peak", "VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}


@dataclass(frozen=True)
class Watched:
    """``samples``: {"time" (s since the epoch), "rss", "anonymous", "file", "shared"} (bytes); ``peak`` (bytes) is the
    kernel's own high-water mark of resident pages, of files or not, so no moment between samples is missed;
    ``events``: what the process said, each with its "time"."""

    samples: list[dict[str, float]]
    peak: int
    events: list[dict[str, Any]]


def watch(command: Sequence[str], threads: int, interval: float = INTERVAL) -> Watched:
    """Runs a command that prints JSON lines. Raises ExpertFlowError with the end of its errors if it fails."""
    if not Path("/proc/self/status").is_file():
        raise ExpertFlowError("memory is watched through /proc, which this system lacks: run this on Linux")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment, text=True)
        samples, peak = _follow(process, interval)
        if process.returncode != 0:
            errors.seek(0)
            raise ExpertFlowError(f"{' '.join(command[:4])} failed ({process.returncode}): {errors.read()[-2000:]}")
        said.seek(0)
        return Watched(samples, peak, [json.loads(line) for line in said])


def _follow(process: "subprocess.Popen[str]", interval: float) -> tuple[list[dict[str, float]], int]:
    samples: list[dict[str, float]] = []
    peak = 0
    while process.poll() is None:
        if (sample := resident(process.pid)) is not None:
            peak = max(peak, int(sample.pop("peak")))
            samples.append({"time": time.time(), **sample})
        time.sleep(interval)
    return samples, peak


def resident(pid: int) -> dict[str, float] | None:
    """Resident bytes of a process, by kind; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines) if name in _FIELDS}
    return {_FIELDS[name]: int(value[0]) * 1024 for name, value in found.items()} if "VmRSS" in found else None


def job_command(*arguments: object) -> list[str]:
    """The command line of the process that is watched."""
    return [sys.executable, "-m", "eval.streaming.job", *(str(argument) for argument in arguments)]
