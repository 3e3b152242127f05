"""Run lmms-eval on local files, offline, in a process of its own, and read back what it found."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.harness.stock import HarnessError, StockTask
from eval.pool import ROOT

EXTRA = "expertflow-quant[lmms]"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def require_harness() -> None:
    """Raises HarnessError, which says how to install it, where lmms-eval is not."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise HarnessError(
            f"lmms-eval is not installed for {sys.executable}: pip install '{EXTRA}', best in an environment of its "
            "own (it brings about 120 packages, torchvision among them), and run this command with its Python"
        )


def run_harness(model: Mapping[str, Any], data: Mapping[StockTask, Path], limit: int | None = None) -> dict[str, Any]:
    """lmms-eval's stock tasks on the files of ``data``; its progress is shown.

    ``model``: the arguments of ``expertflow_quant.harness.lmms.ExpertFlow``. ``limit``: first documents of each task.
    Returns the harness's ``version``, and its ``tasks`` by name with ``scores`` (means by metric) and ``samples`` (see
    worker.py). Raises HarnessError when it is not installed, for files that it cannot read, and when it fails.
    """
    require_harness()
    overrides = [task.override(path) for task, path in data.items()]
    with tempfile.TemporaryDirectory(prefix="lmms-eval-") as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps({"model": dict(model), "tasks": overrides, "limit": limit}), encoding="utf-8")
        command = (sys.executable, "-m", "eval.harness.worker", str(asked), str(answered))
        done = subprocess.run(command, cwd=ROOT, env=os.environ | OFFLINE, check=False)
        if done.returncode != 0 or not answered.is_file():
            raise HarnessError(
                f"lmms-eval ended with code {done.returncode} and no results: the reason is what it printed above"
            )
        return json.loads(answered.read_text(encoding="utf-8"))
