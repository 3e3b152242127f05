"""A plugin of pytest that writes each test's outcome as it ends: a run that is stopped has still told what it saw.

``pytest -p eval.gpu_tests.outcomes --outcomes FILE`` adds one JSON line for the tests that were found, and one for
each that has ended: {"found": [id, ...]}, {"test": id, "outcome": "passed", "why": ""}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

Report = pytest.TestReport | pytest.CollectReport


def pytest_addoption(parser: pytest.Parser) -> None:
    """The file is an option of pytest."""
    parser.addoption("--outcomes", type=Path, help="add one JSON line for each test that ends")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that hears of all tests writes, none of those that pytest-xdist starts."""
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._add({"found": [item.nodeid for item in session.items]})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self._add({"found": list(ids)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._ended(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._ended(report)

    def _ended(self, report: Report) -> None:
        self._add({"test": report.nodeid, "outcome": report.outcome, "why": _why(report)})

    def _add(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _why(report: Report) -> str:
    """A skipped test's reason, or the last line of a failed one's error."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if report.outcome == "passed" else str(crash.message if crash else report.longrepr)[:1000]
