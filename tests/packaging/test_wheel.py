"""The wheel holds the library and nothing else, works where there is no checkout, and says what it is."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_THE_COPY = shutil.ignore_patterns("__pycache__", "*.safetensors", "results", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for room in ("expertflow_quant", "eval", "calibration"):
        shutil.copytree(ROOT / room, source / room, ignore=NOT_IN_THE_COPY)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_only_the_library_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {name for name in names if ".dist-info/" not in name}
    in_the_tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "expertflow_quant").rglob("*.py")} | {
        "expertflow_quant/py.typed"
    }
    assert modules == in_the_tree


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        folder = name.removesuffix("/METADATA")
        metadata = Parser().parsestr(archive.read(name).decode())
        license_text = archive.read(f"{folder}/licenses/LICENSE").decode()
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(f"{folder}/entry_points.txt").decode())
    assert (metadata["Name"], metadata["Version"]) == ("expertflow-quant", "0.1.0")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in license_text
    assert dict(scripts["console_scripts"]) == {"expertflow-quant": "expertflow_quant.cli.main:app"}
    assert dict(scripts["lmms_eval.models"]) == {"expertflow": "expertflow_quant.harness.manifest:manifest"}
    assert {"serve", "parquet", "lmms", "eval", "test"} <= set(metadata.get_all("Provides-Extra", []))


def test_it_imports_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import expertflow_quant, importlib.util, pathlib; "
        "print(pathlib.Path(expertflow_quant.__file__).parent.parent); "
        "assert callable(expertflow_quant.load)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == site
