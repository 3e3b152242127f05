"""Run commands as subprocesses, a few side by side, each with its own log; the first failure stops all."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL = 2000


class JobError(RuntimeError):
    """A subprocess that failed: names it, its exit status, its log and the end of that log."""


@dataclass(frozen=True)
class Job:
    """Commands to be run one after the other in the checkout's root; all they print goes to ``log``.

    ``total`` lines of the file ``lines`` (after its first) are the whole job, for its bar; ``note`` is
    said when it is done.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path
    note: str = ""
    lines: Path | None = None
    total: int | None = None


@dataclass
class Pool:
    """At most ``workers`` jobs at once, one thread of arithmetic each."""

    workers: int
    console: Console
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all ``jobs``, a bar for each, a line as it ends. Raises JobError for the first to fail."""
        with ThreadPoolExecutor(self.workers) as threads, progress_bars(jobs, self.console):
            started = {threads.submit(self._run_job, job): job for job in jobs}
            try:
                for future in as_completed(started):
                    seconds, job = future.result(), started[future]
                    self.console.print(f"   {seconds:6.1f} s  {job.name:<10} {job.note}", highlight=False)
            except BaseException:
                self._stop()
                raise

    def _run_job(self, job: Job) -> float:
        start = time.perf_counter()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            for command in job.commands:
                if self._run_command(command, log) != 0:
                    raise JobError(describe_failure(job.name, command, job.log))
        return time.perf_counter() - start

    def _run_command(self, command: Sequence[str], log: IO[bytes]) -> int:
        with self._lock:
            if self._stopped:
                return -1
            process = start_process(command, log)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def progress_bars(jobs: Sequence[Job], console: Console) -> Iterator[None]:
    """While the block runs, a bar for every job that says how far it is, read from the file it writes."""
    columns = (
        TextColumn("   {task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    over = threading.Event()
    with Progress(*columns, console=console, transient=True) as bars:
        rows = [(job, bars.add_task(job.name, total=job.total, start=False)) for job in jobs]
        watcher = threading.Thread(target=_watch, args=(bars, rows, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _watch(bars: Progress, rows: Sequence[tuple[Job, TaskID]], over: threading.Event) -> None:
    waiting = {row for _, row in rows}
    while not over.wait(0.5):
        for job, row in rows:
            if row in waiting and job.log.exists():
                bars.start_task(row)
                waiting.discard(row)
            if job.lines is not None and job.lines.exists():
                bars.update(row, completed=max(0, job.lines.read_bytes().count(b"\n") - 1))


def start_process(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """One command in the checkout's root, on one thread, offline, without colours, everything into
    ``log``."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "160",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def describe_failure(name: str, command: Sequence[str], log: Path) -> str:
    """What to tell about a failed command."""
    tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].rstrip()
    return f"{name} failed: {' '.join(command)}\nthe end of {log}:\n{tail}"


def library_command() -> tuple[str, ...]:
    """How to call ``expertflow-quant``: its script beside this Python, or the module where it is not
    installed."""
    for script in ("expertflow-quant", "expertflow-quant.exe"):
        if (path := Path(sys.executable).parent / script).is_file():
            return (str(path),)
    return (sys.executable, "-c", "from expertflow_quant.cli.main import app; app()")
