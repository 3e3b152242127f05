"""What the installer decides: interpreter, build of torch, place of torchvision. Nothing is installed."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {
    "torch": ["2.15.0", "2.13.0+cpu", "2.13.0", "2.12.1+cpu", "2.9.0+cpu", "2.9.0"],
    "torchvision": ["0.29.2", "0.28.1", "0.28.0", "0.2.2.post3"],
}


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer_under_test", ROOT / ".ci" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A machine on Linux without a GPU, with two interpreters; returns what pip was asked to install."""
    asked: list[list[str]] = []
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(install, "interpreters", lambda: ["/python3.12", "/python3.11"])
    monkeypatch.setattr(install, "works", lambda venv: False)
    monkeypatch.setattr(install, "make_venv", lambda python, venv: asked.append(["venv", python]))
    monkeypatch.setattr(install, "seen_versions", lambda venv, name: VERSIONS[name])
    monkeypatch.setattr(install, "pip_install", lambda venv, arguments: asked.append(arguments) or True)
    monkeypatch.setattr(install, "ask", lambda venv, code: "2.13.0+cpu None")
    monkeypatch.setattr(install, "check", lambda venv: None)
    monkeypatch.setattr(install, "folder_gib", lambda venv: 0.0)
    return asked


def test_without_a_gpu_the_newest_cpu_build_in_range(install: ModuleType, calls: list[list[str]]) -> None:
    venv = Path("/somewhere/.venv")
    install.main(venv, [])
    assert calls == [
        ["venv", "/python3.12"],
        ["-e", f"{ROOT}[test]", "torch==2.13.0+cpu"],
        ["--no-deps", "--target", str(venv / "torchvision-side"), "torchvision==0.28.1"],
    ]


def test_an_interpreter_for_which_there_is_one_is_preferred(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, "2.13.0+cpu"])
    monkeypatch.setattr(install, "newest_cpu_torch", lambda venv: next(answers))
    install.main(Path("/somewhere/.venv"), [])
    assert calls[:2] == [["venv", "/python3.12"], ["venv", "/python3.11"]]
    assert "torch==2.13.0+cpu" in calls[2]


def test_where_there_is_none_the_default_with_a_notice(
    install: ModuleType,
    calls: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(install, "newest_cpu_torch", lambda venv: None)
    monkeypatch.setattr(install, "ask", lambda venv, code: "2.14.1+cu132 13.2")
    install.main(Path("/somewhere/.venv"), [])
    assert calls[-3:] == [["venv", "/python3.12"], ["-e", f"{ROOT}[test]"], ["torchvision==0.29.2"]]
    assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().out


def test_with_a_gpu_nobody_asks_for_cpu_builds(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(install, "ask", lambda venv, code: "2.14.1+cu132 13.2")
    install.main(Path("/somewhere/.venv"), [])
    assert calls == [["venv", "/python3.12"], ["-e", f"{ROOT}[test]"], ["torchvision==0.29.2"]]


def test_a_pinned_torch_is_taken_as_it_is(install: ModuleType, calls: list[list[str]]) -> None:
    install.main(Path("/somewhere/.venv"), ["torch==2.11.0", "transformers==5.17.0"])
    assert calls[1] == ["-e", f"{ROOT}[test]", "torch==2.11.0", "transformers==5.17.0"]


def test_a_torch_without_a_torchvision_is_no_reason_to_stop(
    install: ModuleType,
    calls: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(install, "ask", lambda venv, code: "2.15.0+cpu None")
    install.main(Path("/somewhere/.venv"), [])
    assert len(calls) == 2
    assert "without torchvision" in capsys.readouterr().out


def test_what_cannot_be_installed_is_an_error(
    install: ModuleType, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "pip_install", lambda venv, arguments: False)
    with pytest.raises(SystemExit, match="could not install"):
        install.main(Path("/somewhere/.venv"), [])


def test_pip_is_tried_once_more(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codes = iter([1, 0])
    tries: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        tries.append(command)
        return type("Done", (), {"returncode": next(codes)})()

    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.pip_install(tmp_path, ["something"])
    assert len(tries) == 2


def test_a_folder_of_something_else_is_never_cleared(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit, match="not a virtual environment"):
        install.make_venv("/python3.12", tmp_path)
    assert (tmp_path / "letter.txt").exists()
