"""README.md agrees with the tree and the figures, and its example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {".ci", "calibration", "eval", "expertflow_quant", "tests"}


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listing.stdout.splitlines()


def test_the_tree_has_the_rooms_that_the_design_names() -> None:
    assert {name.split("/")[0] for name in tracked_files() if "/" in name} == ROOMS


def test_table_and_file_map_are_up_to_date() -> None:
    tracked_files()
    command = [sys.executable, ".ci/readme.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_example_runs_as_written(tmp_path: Path) -> None:
    """In an empty folder that sees the checkout's shipped models under the name that the example uses."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    (tmp_path / "calibration").symlink_to(ROOT / "calibration", target_is_directory=True)
    result = subprocess.run(
        [sys.executable, "-P", "-c", example[1]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "->" in result.stdout
    assert "bytes moved" in result.stdout
