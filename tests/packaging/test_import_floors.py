"""The import contracts of setup.cfg hold, and they would notice an import that goes up."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("expertflow_quant", "eval", "calibration")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The code alone, without weights or results, to be spoiled."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    # -P and cwd: the copy's rooms are the ones that are read, not the checkout's
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; "
    command = [sys.executable, "-c", code + "sys.exit(lint_imports(no_cache=True))"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_floors_hold(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("expertflow_quant/formats/spec.py", "expertflow_quant.runtime"),
        ("expertflow_quant/kernels/reference.py", "expertflow_quant.quantize"),
        ("expertflow_quant/offload/__init__.py", "expertflow_quant.serve"),
        ("expertflow_quant/formats/spec.py", "eval.metrics"),
        ("calibration/__init__.py", "eval.metrics"),
        ("eval/__init__.py", "calibration.shipped"),
    ],
)
def test_an_import_that_goes_up_is_noticed(tree: Path, importer: str, imported: str) -> None:
    with (tree / importer).open("a", encoding="utf-8") as file:
        file.write(f"\nimport {imported}\n")
    result = lint_imports(tree)
    assert result.returncode != 0
    assert "BROKEN" in result.stdout


def test_a_room_without_a_floor_is_noticed(tree: Path) -> None:
    (tree / "expertflow_quant/attic").mkdir()
    (tree / "expertflow_quant/attic/__init__.py").touch()
    result = lint_imports(tree)
    assert result.returncode != 0
    assert "attic" in result.stdout
