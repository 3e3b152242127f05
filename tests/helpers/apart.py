"""What is measured in a process of its own, so that nothing of this one is measured with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def told_by(script: str, *arguments: object) -> Any:
    """The JSON that ``script`` prints last, run in the checkout with ``arguments``; fails where it does."""
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
