"""`python -m eval gpu-tests --out FILE`: every test that needs a GPU, and what came of each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from eval.pool import ROOT
from eval.provenance import provenance
from eval.report import cells_table, make_console, write_json

ALONE, TOGETHER = "cuda and alone", "cuda and not alone"
OK, NO_TESTS = 0, 5  # of pytest.ExitCode, which only those who run tests need to have
PASSED, FAILED, SKIPPED, NOT_RUN = OUTCOMES = ("passed", "failed", "skipped", "not run")


def gpu_tests(
    paths: Annotated[list[Path] | None, typer.Argument(help="some of the tests; all where none is named")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes side by side: Triton compiles most of the time")] = 8,
    limit: Annotated[float, typer.Option(min=1, help="seconds after which what still runs is stopped")] = 3600,
    out: Annotated[Path | None, typer.Option(help="write what came of each test into this JSON file")] = None,
) -> None:
    """Run the tests that need an NVIDIA GPU. Exit status 1 unless all of them ran and none failed. Those that weigh a
    GPU's memory run before the others; where there are several GPUs, beside them, on one of their own."""
    if not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} finds no NVIDIA GPU: run this where there is one")
    begun = time.monotonic()
    gpus, named = visible_gpus(), list(map(str, paths or []))
    alone = ["-m", ALONE, *named], gpus[::-1]
    together = ["-m", TOGETHER, "-n", str(workers), "--dist", "load", *named], gpus[:-1] or gpus
    statuses: list[int | None] = []
    with TemporaryDirectory() as folder:
        for beside in [[alone, together]] if len(gpus) > 1 else [[alone], [together]]:
            with ExitStack() as running:
                started = [
                    running.enter_context(pytest_session(words, Path(folder) / f"{words[1]}.jsonl", seen))
                    for words, seen in beside
                ]
                statuses += [status(each, limit - (time.monotonic() - begun)) for each in started]
        told = tally(sorted(Path(folder).iterdir()))
    found = {"seconds": round(time.monotonic() - begun), "gpus": len(gpus), "pytest": statuses, **told}
    make_console().print(outcomes_table(found))
    if out is not None:
        write_json(out, {"made": provenance("eval", sys.argv[1:], "cuda"), **found})
    if not found["counts"][PASSED] or not set(statuses) <= {OK, NO_TESTS}:
        raise typer.Exit(1)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that torch finds."""
    count = torch.cuda.device_count()  # CUDA stops at the first name that is no GPU's
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()][:count] or list(map(str, range(count)))


@contextmanager
def pytest_session(
    arguments: Sequence[str], lines: Path, gpus: Sequence[str] = ()
) -> Iterator["subprocess.Popen[bytes]"]:
    """pytest in the checkout, outcomes added to ``lines``; it and all it started are ended with the block. ``gpus``:
    those that it sees, all where none is named."""
    # one word: of a path by itself, once there is such a file, pytest takes the folder for the checkout's
    told = f"--outcomes={lines}"
    command = [sys.executable, "-m", "pytest", "-p", "eval.gpu_tests.outcomes", told, *arguments]
    # a session of its own: what a hung test has started ends too
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, **seen})
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def status(running: "subprocess.Popen[bytes]", limit: float) -> int | None:
    """The exit status, None where it has not ended within ``limit`` seconds."""
    try:
        return running.wait(max(0, limit))
    except subprocess.TimeoutExpired:
        print("pytest is stopped: its time is up", file=sys.stderr)
        return None


def tally(outcomes: Iterable[Path]) -> dict[str, Any]:
    """What came of each test: {"counts": {outcome: n}, "files": {file: {outcome: n}}, outcome but "passed":
    {test: why}}. A test that failed while it was set up or torn down has failed, and so has a file that cannot be
    read."""
    texts = [file.read_text(encoding="utf-8") for file in outcomes]
    written = [json.loads(line) for text in texts for line in text.splitlines()]
    ended: dict[str, tuple[str, str]] = {}
    for line in written:
        if "test" in line and ended.get(line["test"], ("", ""))[0] != FAILED:
            ended[line["test"]] = line["outcome"], line["why"]
    every = dict.fromkeys([*(test for line in written for test in line.get("found", ())), *ended])
    came_of = {test: ended.get(test, (NOT_RUN, "")) for test in every}
    files: dict[str, Counter[str]] = {}
    for test, (outcome, _) in came_of.items():
        files.setdefault(test.split("::")[0], Counter())[outcome] += 1
    return {
        "counts": _counts(sum(files.values(), Counter())),
        "files": {file: _counts(count) for file, count in sorted(files.items())},
        **{outcome: _whys(came_of, outcome) for outcome in OUTCOMES if outcome != PASSED},
    }


def _counts(count: Counter[str]) -> dict[str, int]:
    return {outcome: count[outcome] for outcome in OUTCOMES}


def _whys(came_of: dict[str, tuple[str, str]], wanted: str) -> dict[str, str]:
    return {test: why for test, (outcome, why) in came_of.items() if outcome == wanted}


def outcomes_table(found: dict[str, Any]) -> Any:
    """A line a file, and all of them."""
    rows = [[file, *map(str, count.values())] for file, count in found["files"].items()]
    return cells_table("tests on a GPU", ["file", *OUTCOMES], [*rows, ["all", *map(str, found["counts"].values())]])
