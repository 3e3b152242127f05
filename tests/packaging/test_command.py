"""The installed console script runs."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def script() -> Path:
    try:
        importlib.metadata.distribution("expertflow-quant")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("expertflow-quant is not installed in this environment: make install")
    return Path(sys.executable).parent / ("expertflow-quant.exe" if os.name == "nt" else "expertflow-quant")


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120"}
    return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=False)


def test_help_names_the_commands(script: Path) -> None:
    result = run(script, "--help")
    assert result.returncode == 0, result.stderr
    for command in ("quantize", "serve", "up"):
        assert command in result.stdout


@pytest.mark.parametrize("command", ["quantize", "serve", "up"])
def test_each_command_explains_itself(script: Path, command: str) -> None:
    result = run(script, command, "--help")
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout


def test_an_unknown_command_is_an_error(script: Path) -> None:
    result = run(script, "no-such-command")
    assert result.returncode != 0
    assert "no-such-command" in result.stderr
