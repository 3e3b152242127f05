"""Nothing in the checkout reads or writes pickles, or runs code that came with a model."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("expertflow_quant", "eval", "calibration")
PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle"}
FORBIDDEN_TRUE = {"allow_pickle", "trust_remote_code"}


def offences(source: str) -> list[str]:
    return [text for node in ast.walk(ast.parse(source)) for text in _offences_of(node)]


def _offences_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING_MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        if node.module.split(".")[0] in PICKLING_MODULES:
            yield node.module
        yield from sorted(names & PICKLING_CALLS)
    elif isinstance(node, ast.Call):
        if ast.unparse(node.func) in PICKLING_CALLS:
            yield ast.unparse(node.func)
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_TRUE and ast.unparse(keyword.value) == "True":
                yield f"{keyword.arg}=True"


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_pickles(room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): bad
        for path in sorted((ROOT / room).rglob("*.py"))
        if (bad := offences(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "def f():\n    return np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_scan_sees_each_way_of_pickling(source: str) -> None:
    assert offences(source)


def test_the_scan_passes_honest_code() -> None:
    assert not offences("from safetensors.torch import save_file\nimport json\njson.load(open('x'))")
