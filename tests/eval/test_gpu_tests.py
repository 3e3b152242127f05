"""What a run of the GPU's tests leaves behind: on a folder of tests of every outcome, in one process and in two, ended
by a limit, and where there is no GPU."""

import json
import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.gpu_tests import command
from eval.gpu_tests.command import ALONE, pytest_session, status, tally

TESTS = """
import time
import pytest

pytestmark = MARKS

def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no second GPU")
def test_without(): pass
@pytest.fixture
def torn():
    yield
    raise OSError("torn down")
def test_torn(torn): pass
def test_last(): time.sleep(SLEEP)
"""


def run_pytest(arguments: list[str], lines: Path, limit: float) -> int | None:
    with pytest_session(arguments, lines) as running:
        return status(running, limit)


def written(folder: Path, name: str, alone: bool = False, sleep: float = 0) -> Path:
    path = folder / f"test_{name}.py"
    path.write_text(
        TESTS.replace("MARKS", f"[pytest.mark.cuda{', pytest.mark.alone' * alone}]").replace("SLEEP", str(sleep))
    )
    return path


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["one", "two"])
def test_each_outcome_is_told_with_its_reason(processes: list[str], tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    assert run_pytest(["-m", "cuda", *processes, "-q", str(written(tmp_path, "a"))], lines, 60) == 1
    found = tally([lines])
    assert found["counts"] == {"passed": 2, "failed": 2, "skipped": 1, "not run": 0}
    ((file, count),) = found["files"].items()
    assert file.endswith("test_a.py")
    assert count == found["counts"]
    reasons = sorted(found["failed"].values())
    assert "one is not two" in reasons[0]
    assert reasons[1] == "OSError: torn down"
    assert list(found["skipped"].values()) == ["no second GPU"]


def test_a_run_that_hangs_is_ended_and_has_told_what_it_saw(tmp_path: Path) -> None:
    lines, begun = tmp_path / "lines.jsonl", time.monotonic()
    assert run_pytest(["-m", "cuda", "-q", str(written(tmp_path, "a", sleep=600))], lines, 15) is None
    assert time.monotonic() - begun < 60
    found = tally([lines])
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1, "not run": 1}
    assert [test.split("::")[1] for test in found["not run"]] == ["test_last"]
    assert run_pytest(["--version"], lines, 0) is None


def test_the_command_runs_the_lonely_ones_alone_and_writes_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "provenance", lambda module, arguments, device: {"device": device})
    paths, asked, run = [written(tmp_path, "a", alone=True), written(tmp_path, "b")], [], command.pytest_session
    monkeypatch.setattr(command, "pytest_session", lambda *given: (asked.append(given[0][:3]), run(*given))[1])
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["gpu-tests", *map(str, paths), "--workers", "1", "--out", str(out)])
    assert result.exit_code == 1
    assert asked == [["-m", ALONE, str(paths[0])], ["-m", command.TOGETHER, "-n"]]
    figure = json.loads(out.read_text())
    assert figure["made"] == {"device": "cuda"}
    assert figure["counts"] == {"passed": 4, "failed": 4, "skipped": 2, "not run": 0}
    assert len(figure["files"]) == 2


def test_a_file_of_outcomes_that_is_there_does_not_move_the_checkout(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.touch()
    assert run_pytest(["-q", "--collect-only", "tests/eval/test_gpu_tests.py"], lines, 60) == 0
    (found,) = map(json.loads, lines.read_text().splitlines())
    assert {test.split("::")[0] for test in found["found"]} == {"tests/eval/test_gpu_tests.py"}


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("", {ALONE: "1,0", command.TOGETHER: "0"}),
        ("2, 3", {ALONE: "3,2", command.TOGETHER: "2"}),
        ("3", dict.fromkeys([ALONE, command.TOGETHER], "3")),
        ("3,-1", dict.fromkeys([ALONE, command.TOGETHER], "3")),
    ],
    ids=["two GPUs", "two by name", "one of them", "one and no GPU's name"],
)
def test_the_lonely_ones_have_a_gpu_to_themselves(
    named: str, seen: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: 1 if named.startswith("3") else 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    asked: dict[str, str] = {}
    monkeypatch.setattr(
        command,
        "pytest_session",
        lambda arguments, lines, gpus: nullcontext(asked.update({arguments[1]: ",".join(gpus)})),
    )
    monkeypatch.setattr(command, "status", lambda running, limit: 0)
    assert CliRunner().invoke(app, ["gpu-tests"]).exit_code == 1
    assert asked == seen


@pytest.mark.parametrize("gpus", [1, 2])
def test_ctrl_c_ends_what_was_started(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    alive = tmp_path / "alive"
    (tmp_path / "test_a.py").write_text(
        f"import pathlib, pytest, time\n@pytest.mark.cuda\n@pytest.mark.alone\ndef test_slow():\n"
        f"    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(600)\n"
    )

    def interrupt() -> None:
        while not alive.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    arguments = ["gpu-tests", str(tmp_path / "test_a.py"), "--workers", "1", "--limit", "60"]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    assert time.monotonic() - begun < 45


def test_a_file_that_cannot_be_read_has_failed(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module")
    (tmp_path / "test_b.py").write_text("import pytest; pytest.importorskip('no_such_module')")
    lines = tmp_path / "lines.jsonl"
    assert run_pytest(["-m", "cuda", "-q", str(tmp_path)], lines, 60) == 2
    found = tally([lines])
    assert found["counts"] == {"passed": 0, "failed": 1, "skipped": 1, "not run": 0}
    assert "No module named 'no_such_module'" in "".join(found["failed"].values())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["gpu-tests"])
    assert result.exit_code == 2
    assert "finds no NVIDIA GPU" in result.output
