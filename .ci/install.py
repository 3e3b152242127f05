"""Make the virtual environment of this checkout and install what it needs; run by the Makefile.

    python .ci/install.py .venv [REQUIREMENT ...]        e.g.  .venv transformers==5.17.0

Runs on the standard library alone. An environment that is already there is brought up to date, not made anew.
On Linux, torch's default wheel on the public index brings gigabytes of CUDA packages. So where there is no
NVIDIA GPU, every suitable interpreter is asked whether its pip can see a CPU build of torch (a version ending
in "+cpu", from any index or folder that pip is configured to search), and the first that can is taken.
torchvision's Linux wheels on the public index are CUDA builds, which break beside a CPU torch. There it goes
into a side folder (torchvision-side) that one test uses; beside any other torch it is installed as usual.
"""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
INTERPRETERS = ("python3.12", "python3.11", "python3", "python3.14", "python3.13", "python")
CPU_SUFFIX = "+cpu"
SIDE_FOLDER = "torchvision-side"


def main(venv: Path, extra: list[str]) -> None:
    started = time.monotonic()
    gpu = has_nvidia_gpu()
    cpu_build_needed = not gpu and platform.system() == "Linux"
    torch = prepare_venv(venv, cpu_build_needed, extra)
    if cpu_build_needed and torch is None and not pins_torch(extra):
        say(
            "no NVIDIA GPU here, and pip sees no CPU build of torch: taking the default, which may bring "
            "gigabytes of CUDA packages. To avoid them, name an index of CPU builds in PIP_EXTRA_INDEX_URL"
        )
    wanted = ["-e", f"{ROOT}[test]", *([f"torch=={torch}"] if torch else []), *extra]
    say("installing " + " ".join(wanted).replace(str(ROOT), ".") + " (this takes some minutes)")
    if not pip_install(venv, wanted):
        stop("could not install what is needed; pip says above why")
    if not install_torchvision(venv):
        say("going on without torchvision: only the test with transformers' own processor needs it")
    check(venv)
    say(f"{venv} is ready: {folder_gib(venv):.1f} GiB, {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"[install] {text}")


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    answer = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


def pins_torch(extra: list[str]) -> bool:
    return any(re.match(r"torch\s*[=<>!~@]", item) for item in extra)


def prepare_venv(venv: Path, cpu_build_needed: bool, extra: list[str]) -> str | None:
    """Leave a working environment at `venv`; return the CPU build of torch to install, if wanted and seen."""
    look = cpu_build_needed and not pins_torch(extra)
    if works(venv):
        return newest_cpu_torch(venv) if look else None
    candidates = interpreters()
    if not candidates:
        stop("no Python 3.11+ that makes environments: install one, or name it: PYTHON=... make")
    for python in candidates if look else []:
        make_venv(python, venv)
        torch = newest_cpu_torch(venv)
        if torch is not None:
            say(f"using {python}; its pip sees a CPU build of torch, {torch}")
            return torch
    make_venv(candidates[0], venv)
    say(f"using {candidates[0]}")
    return None


def interpreters() -> list[str]:
    """Suitable interpreters, the preferred one first, each once. PYTHON, where set, is the only one."""
    named = os.environ.get("PYTHON")
    found: dict[str, str] = {}
    for name in [named] if named else INTERPRETERS:
        path = shutil.which(name)
        version = python_version(path) if path else None
        if path and version and version >= OLDEST_PYTHON:
            found.setdefault(".".join(map(str, version)), path)
    return list(found.values())


def python_version(path: str) -> tuple[int, ...] | None:
    """Major and minor version; None when it does not run (a version manager's shim) or makes no venv."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    answer = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, answer.stdout.split())) if answer.returncode == 0 else None


def make_venv(python: str, venv: Path) -> None:
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        stop(f"{venv} holds something that is not a virtual environment: move it, or name another: VENV=...")
    subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True)


def interpreter(venv: Path) -> str:
    return str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def works(venv: Path) -> bool:
    python = interpreter(venv)
    if not Path(python).exists() or (python_version(python) or (0,)) < OLDEST_PYTHON:
        return False
    pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    return pip.returncode == 0


def ask(venv: Path, code: str) -> str:
    """What the environment's interpreter prints for `code`."""
    answer = subprocess.run([interpreter(venv), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return answer.stdout.strip()


def newest_cpu_torch(venv: Path) -> str | None:
    """The newest "+cpu" version of torch that this environment's pip can see and setup.cfg allows, if any."""
    builds = [text for text in seen_versions(venv, "torch") if text.endswith(CPU_SUFFIX)]
    return max((text for text in builds if release(text) >= oldest_torch()), key=release, default=None)


def seen_versions(venv: Path, name: str) -> list[str]:
    """Every version that this environment's pip can see, local builds included."""
    command = [interpreter(venv), "-m", "pip", "index", "versions", name]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    listed = re.search(r"Available versions: (.*)", answer.stdout)
    return [text.strip() for text in listed[1].split(",")] if listed else []


def oldest_torch() -> tuple[int, ...]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    bound = re.search(r"^torch>=([\d.]+)", config["options"]["install_requires"], re.MULTILINE)
    if bound is None:
        stop("setup.cfg names no lower bound of torch: write it as torch>=X.Y")
    return release(bound[1])


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def pip_install(venv: Path, arguments: list[str]) -> bool:
    """pip install, and once more when it fails (a download, usually); whether it worked."""
    options = ["-qq", "--disable-pip-version-check"]
    command = [interpreter(venv), "-m", "pip", "install", *options, *arguments]
    for attempt in ("first", "second"):
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        if code == 0:
            return True
        say(f"pip ended with {code} at the {attempt} try")
    return False


def install_torchvision(venv: Path) -> bool:
    """The torchvision that goes with the installed torch, 0.N+15 with 2.N, if there is one yet."""
    version, cuda = ask(venv, "import torch; print(torch.__version__, torch.version.cuda)").split()
    major, minor, *_ = release(version)
    fitting = [text for text in seen_versions(venv, "torchvision") if release(text)[:2] == (0, minor + 15)]
    if major != 2 or not fitting:
        say(f"pip sees no torchvision for torch {version}")
        return False
    wanted = f"torchvision=={max(fitting, key=release)}"
    if cuda == "None" and platform.system() == "Linux":
        target = venv / SIDE_FOLDER
        shutil.rmtree(target, ignore_errors=True)
        return pip_install(venv, ["--no-deps", "--target", str(target), wanted])
    return pip_install(venv, [wanted])


def check(venv: Path) -> None:
    """Fail now rather than later: dependencies agree, and the two large ones import."""
    subprocess.run([interpreter(venv), "-m", "pip", "check"], check=True)
    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    python, torch, transformers = ask(venv, f"import sys; print(sys.version.split()[0]); {code}").split()
    say(f"python {python}, torch {torch}, transformers {transformers}")


def folder_gib(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 2**30


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python .ci/install.py VENV [REQUIREMENT ...]")
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
