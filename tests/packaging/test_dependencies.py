"""What the code imports is what setup.cfg declares, and the extras are needed only by what they are for."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"expertflow_quant", "eval", "calibration"}
OPTIONAL = ("fastapi", "starlette", "uvicorn", "prometheus_client", "pyarrow", "openai", "triton", "scipy", "lmms_eval")
# run in environments of the packages that they import, by eval/peers/compare.py
ELSEWHERE = ("eval/peers/in_gptqmodel.py", "eval/peers/in_llmcompressor.py")
# always installed with, and pinned by, the package that they belong to: transformers, pydantic
PARTS_OF_ANOTHER = ("tokenizers", "pydantic_core")


def declared(*extras: str) -> set[str]:
    """Distributions that an install with these extras brings by declaration."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    named = {match[0].lower() for line in lines if (match := re.match(r"[\w-]+", line))}
    nested = {name for line in lines for name in re.findall(r"\[([\w,]+)\]", line)}
    return named.union(*(declared(*names.split(",")) for names in nested))


def imported(room: str) -> dict[str, set[str]]:
    """Third-party top-level module -> the files that import it, at any depth."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / room).rglob("*.py"):
        if str(path.relative_to(ROOT)) in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | OURS}


@pytest.mark.parametrize(
    ("room", "extras"),
    [
        ("expertflow_quant", ("serve", "parquet", "gpu", "plan", "lmms")),
        ("eval", ("eval", "test", "lmms")),
        ("calibration", ("eval", "test")),
    ],
)
def test_every_import_is_declared(room: str, extras: tuple[str, ...]) -> None:
    distributions = importlib.metadata.packages_distributions()
    undeclared = {}
    for module, files in imported(room).items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        if not names & declared(*extras):
            undeclared[module] = sorted(files)
    assert {name: files for name, files in undeclared.items() if name not in PARTS_OF_ANOTHER} == {}


def test_the_library_and_its_command_start_without_any_extra() -> None:
    code = (
        "import sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import expertflow_quant\n"
        "expertflow_quant.load, expertflow_quant.quantize_model\n"
        "from expertflow_quant.cli.main import app\n"
        "app(['quantize', '--help'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
