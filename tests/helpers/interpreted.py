"""Tests of Triton kernels: on the CPU through Triton's interpreter, and the same bodies on a GPU.

Triton decides when it is imported whether kernels are interpreted (``TRITON_INTERPRET=1``), so kernels are
interpreted in processes of their own. A room ``tests/ROOM`` follows this pattern:

``tests/ROOM/interpreted/conftest.py`` brings the fixture in::

    from helpers.interpreted import device

    __all__ = ["device"]

``tests/ROOM/interpreted/test_*.py`` takes ``device`` ("cpu" or "cuda") in every test and makes its tensors there; it
imports no kernel file at its top, so that it can be collected without Triton::

    def test_sums(device: str) -> None:
        assert torch.equal(sums(values.to(device)), values.sum().to(device))

``tests/ROOM/test_interpreted_ROOM.py`` runs each of those files in a process with the variable set::

    @pytest.mark.parametrize("file", interpreted.files(__file__), ids=lambda file: file.stem)
    def test_kernels_pass_in_the_interpreter(file: Path) -> None:
        interpreted.check(file)

What runs where: plain ``pytest`` skips the "cpu" variants in place and runs them through the driver;
``TRITON_INTERPRET=1 pytest tests/ROOM/interpreted`` runs them directly, which is how to debug them;
``pytest -m cuda`` runs the "cuda" variants, compiled. ``device`` lives as long as the session, so hypothesis takes it.
A file should pass in the interpreter within a minute or so.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 280
"""For one file: under the timeout of the test that waits for it."""


def interpreting() -> bool:
    """Whether kernels of this process are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: "cpu" in the interpreter only, "cuda" compiled only."""
    if request.param == "cpu" and not interpreting():
        pytest.skip("kernels run on the CPU only under TRITON_INTERPRET=1: another test starts that process")
    if request.param == "cuda" and interpreting():
        pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process")
    return str(request.param)


def files(driver: str) -> list[Path]:
    """The test files in the folder ``interpreted`` beside the test file ``driver``."""
    return sorted((Path(driver).parent / "interpreted").glob("test_*.py"))


def check(file: Path) -> None:
    """Run ``file`` under the interpreter in a process of its own; fails unless every test passes, and at least one.

    Skips where Triton is not installed, and where this process is already interpreting.
    """
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if interpreting():
        pytest.skip("TRITON_INTERPRET=1: the files run in this process")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-m", "not cuda", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-o", "addopts=--import-mode=importlib --strict-markers --strict-config"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=ROOT,
        env={**inherited, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, f"no test ran:\n{output}"
    assert int(passed[1]) > 0, output
