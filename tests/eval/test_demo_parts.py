"""The demo's parts without the demo: subprocesses side by side, a streamed question, folders, cells."""

import http.server
import io
import json
import sys
import threading
import time
from typing import ClassVar

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from eval.ask import ask, data_url, wait_until_ready
from eval.demo import MARKER, VARIANTS, Demo, app, prepare_folder, quantize_job
from eval.pool import Job, JobError, Pool
from eval.report import cells_table


def job(tmp_path, name: str, *programs: str) -> Job:
    commands = tuple((sys.executable, "-c", program) for program in programs)
    return Job(name, commands, tmp_path / f"{name}.log", "done", tmp_path / f"{name}.jsonl", 2)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_jobs_run_side_by_side_each_with_its_log(tmp_path):
    meet = f"""
import pathlib, time
here = pathlib.Path({str(tmp_path)!r})
(here / NAME).touch()
while not ((here / "a").exists() and (here / "b").exists()):
    time.sleep(0.01)
print("met")
"""
    console = quiet()
    jobs = [job(tmp_path, name, meet.replace("NAME", repr(name)), "print('second')") for name in "ab"]
    Pool(2, console).run(jobs)
    assert (tmp_path / "a.log").read_text() == "met\nsecond\n"
    assert "s  a          done" in console.file.getvalue()


def test_the_first_failure_stops_the_others_and_shows_its_log(tmp_path):
    start = time.perf_counter()
    jobs = [
        job(tmp_path, "good", "import time; time.sleep(60)"),
        job(tmp_path, "bad", "import time; time.sleep(0.5); raise SystemExit('no such model')"),
        job(tmp_path, "late", "import time; time.sleep(60)"),
    ]
    with pytest.raises(JobError, match=r"(?s)bad failed.*no such model"):
        Pool(2, quiet()).run(jobs)
    assert time.perf_counter() - start < 30


class FakeServer(http.server.BaseHTTPRequestHandler):
    """Lists one model; streams three pieces and the counts to whoever sends a picture."""

    seen: ClassVar[list[dict]] = []

    def do_GET(self):
        self._send("application/json", json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}))

    def do_POST(self):
        self.seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        events = [chunk | {"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("4", "", "2")]
        counts = {"prompt_tokens": 60, "completion_tokens": 3, "total_tokens": 63}
        events.append(chunk | {"choices": [], "usage": counts})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send("text/event-stream", "".join(lines) + "data: [DONE]\n\n")

    def _send(self, kind, text):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


def test_a_picture_is_asked_about_through_the_public_client(tmp_path):
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base_url, pieces = f"http://127.0.0.1:{server.server_port}/v1", []
    try:
        wait_until_ready(base_url, lambda: True, (), tmp_path / "log")
        answer = ask(base_url, Image.new("RGB", (4, 4)), "How many?", 16, pieces.append)
    finally:
        server.shutdown()
        server.server_close()
    assert (answer.text, pieces, answer.pieces) == ("42", ["4", "2"], 2)
    assert (answer.prompt_tokens, answer.completion_tokens) == (60, 3)
    image, text = FakeServer.seen[0]["messages"][0]["content"]
    assert image["image_url"]["url"] == data_url(Image.new("RGB", (4, 4)))
    assert text["text"] == "How many?"
    assert FakeServer.seen[0]["temperature"] == 0


def test_a_server_that_dies_is_reported_with_its_log(tmp_path):
    (tmp_path / "log").write_text("port 1 is taken")
    with pytest.raises(JobError, match="port 1 is taken"):
        wait_until_ready("http://127.0.0.1:9/v1", lambda: False, ("serve",), tmp_path / "log")


def test_the_demo_empties_only_its_own_folder(tmp_path):
    prepare_folder(tmp_path / "demo")
    (tmp_path / "demo" / "old").touch()
    prepare_folder(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="choose another --folder"):
        prepare_folder(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    outcome = CliRunner().invoke(app, ["--folder", str(tmp_path / "mine")])
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output


def test_the_mixed_variant_is_planned_first(tmp_path):
    demo = Demo(tmp_path, tmp_path / "moe", tmp_path / "dense", tmp_path / "packed", 8, Pool(1, quiet()), quiet())
    jobs = {variant.name: quantize_job(demo, variant) for variant in VARIANTS}
    plan, make = jobs["mixed"].commands
    assert plan[1:4] == ("-m", "calibration", "plan")
    assert plan[-1] == make[make.index("--plan") + 1]
    assert all(len(job.commands) == 1 for name, job in jobs.items() if name != "mixed")
    assert [system.name for system in demo.systems()] == ["original", *jobs, "dense", "dense-total"]


def test_cells_never_wrap_and_headers_do():
    console = quiet()
    console.print(cells_table("t", ["name", "a long header"], [["mixed 3 bits", "91.4 (-0.2)"]]))
    assert "mixed 3 bits  91.4 (-0.2)" in console.file.getvalue()
