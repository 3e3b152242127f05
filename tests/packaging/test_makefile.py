"""What `make test-gpu` runs, and what it makes of the outcome. Nothing is tested here: an interpreter is made up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
    *"cuda and alone"*) exit "$ALONE" ;;
    *"cuda and not alone"*) exit "$REST" ;;
    *) exit "$NO_GPU" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(
    ("no_gpu", "alone", "rest", "good", "calls"),
    [
        (0, 0, 0, True, 3),
        (0, 5, 0, True, 3),  # pytest: no test of this part was chosen
        (0, 0, 5, True, 3),
        (0, 5, 5, False, 3),
        (0, 1, 0, False, 3),
        (0, 0, 1, False, 3),
        (1, 0, 0, False, 1),  # every test would be skipped
    ],
)
def test_both_parts_run_and_either_can_fail(no_gpu, alone, rest, good, calls, tmp_path):
    python, called = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(FAKE)
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    codes = {"NO_GPU": str(no_gpu), "ALONE": str(alone), "REST": str(rest), "CALLS": str(called)}
    done = subprocess.run(
        ["make", "test-gpu", f"VENV={tmp_path}", "PYTEST_ARGS=tests/kernels -x"],
        cwd=ROOT, env={**os.environ, **codes}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) is good, done.stderr
    asked = called.read_text().splitlines()
    assert len(asked) == calls
    assert all(line.endswith("tests/kernels -x") for line in asked[1:])
