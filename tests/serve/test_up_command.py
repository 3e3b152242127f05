"""`up` end to end: quantize once, serve, answer the public client; then straight to serving."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny
from typer.testing import CliRunner

from expertflow_quant.checkpoint.manifest import Manifest

openai = pytest.importorskip("openai")
server = pytest.importorskip("expertflow_quant.serve.server", exc_type=ImportError)
pytest.importorskip("expertflow_quant.serve.launch", exc_type=ImportError)
quantize = pytest.importorskip("expertflow_quant.pipeline.quantize")

from expertflow_quant.cli.main import app  # noqa: E402

ROOT = Path(__file__).parents[2]
HOW = ("--method", "rtn", "--format", "int4-g16", "--port", "0", "--device", "cpu", "--expert-memory", "50%")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("up") / "tiny-moe"
    tiny.tiny_model("qwen3_vl_moe").save_pretrained(folder)
    tiny.save_processor("qwen3_vl_moe", folder)
    return folder


@pytest.fixture
def invoke(monkeypatch):
    """Run a command in this process up to the point where it would wait for requests."""
    served = []
    monkeypatch.setattr(server, "run", lambda app, listener: served.append(server.address(listener)))

    def run(*arguments, code=0):
        served.clear()
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert len(served) == (code == 0)
        return result.output

    return run


@contextlib.contextmanager
def running(*arguments):
    """The command in a process of its own; gives its output so far and its address once it has one."""
    env = {**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "expertflow_quant.cli.main", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        lines = []
        while not (found := re.search(r"http://[^/ ]+/v1", "".join(lines))):
            line = process.stdout.readline()
            assert line, f"the server ended: {''.join(lines)}"
            lines.append(line)
        yield "".join(lines), found.group()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a POSIX signal")
def test_up_twice_quantizes_once_and_answers_a_public_client(model, tmp_path, data_url):
    told = []
    for _ in range(2):
        with running("up", model, *HOW, "--cache-dir", tmp_path) as (output, url):
            client = openai.OpenAI(base_url=url, api_key="unused", max_retries=8)
            parts = [
                {"type": "image_url", "image_url": {"url": data_url()}},
                {"type": "text", "text": "What is shown?"},
            ]
            stream = client.chat.completions.create(
                model="tiny-moe", messages=[{"role": "user", "content": parts}], max_tokens=8, stream=True
            )
            chunks = list(stream)
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            told.append((output, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)))
    (first, text), (second, again) = told
    assert "quantizing into" in first
    assert "quantized before" in second
    assert "quantizing" not in second
    assert text == again


def test_an_interrupted_up_goes_on_and_ends_with_the_same_bytes(model, tmp_path, invoke, monkeypatch):
    plain = quantize.quantize_model

    def stopped(*arguments, progress, **options):
        def count(done, total, what):
            progress(done, total, what)
            if done == total // 2 + 1:
                raise KeyboardInterrupt

        return plain(*arguments, progress=count, **options)

    monkeypatch.setattr(quantize, "quantize_model", stopped)
    invoke("up", model, *HOW, "--cache-dir", tmp_path / "a", code=130)
    monkeypatch.setattr(quantize, "quantize_model", plain)
    assert "1 layers kept from an earlier run" in invoke("up", model, *HOW, "--cache-dir", tmp_path / "a")
    invoke("up", model, *HOW, "--cache-dir", tmp_path / "b")
    made = [next(path.parent for path in tmp_path.glob(f"{shelf}/*/manifest.json")) for shelf in "ab"]
    assert made[0].name == made[1].name
    assert (made[0] / "manifest.json").read_bytes() == (made[1] / "manifest.json").read_bytes()
    assert Manifest.load(made[0]).made["method"] == "rtn"


def test_a_plan_gives_mixed_formats(model, tmp_path, invoke):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"default": "int4-g16", "layers": {"0": {"3": "int2-g16"}, "1": "int8-g16"}}))
    output = invoke(
        *("up", model, "--plan", plan, "--method", "rtn", "--port", "0", "--device", "cpu"),
        *("--cache-dir", tmp_path / "shelf", "--name", "my-model"),
    )
    assert re.search(r"formats +int2-g16 x 1, int4-g16 x 7, int8-g16 x 8", output)
    assert re.search(r"model +my-model \(qwen3_vl_moe\)", output)
    assert "in 16 slots (100%)" in output
    assert '"model": "my-model"' in output


def test_serve_shows_what_it_serves_and_refuses_before_it_listens(model, tmp_path, invoke):
    invoke("up", model, *HOW, "--cache-dir", tmp_path)
    (checkpoint,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    start = time.monotonic()
    output = invoke("serve", checkpoint, "--port", "0", "--device", "cpu", "--expert-memory", "50%")
    assert time.monotonic() - start < 60
    assert "16 in 2 layers, 2 per token and layer" in output
    assert re.search(r"on the device +[0-9.]+ KiB in 8 slots \(50%\)", output)
    assert re.search(r"path +plain: the device is cpu", output)
    assert re.search(r"context +256 tokens", output)
    assert "curl -s http://127.0.0.1:" in output
    for arguments, reason in (
        (("serve", model), "no finished expertflow checkpoint"),
        (("up", checkpoint), "is quantized already"),
        (("up", tmp_path), "no folder with a config.json"),
        (("serve", checkpoint, "--expert-memory", "1KiB"), "raise --expert-memory"),
        (
            ("serve", checkpoint, "--gpu-memory", "1GiB", "--device", "cpu"),
            "bound what experts take with --expert-memory",
        ),
        (("up", model, *HOW, "--cache-dir", tmp_path, "--host-memory", "1GiB"), "--host-memory '1GiB'"),
        (("serve", checkpoint, "--fast", "--context", "1"), "--context 1 holds no prompt"),
        (("serve", checkpoint, "--device", "abacus"), "device 'abacus' is not known"),
        (("serve", checkpoint, "--dtype", "int9"), "dtype 'int9' is not known"),
        (("serve", checkpoint, "--max-queue", "-1"), "max_queue is -1"),
        (("up", model, "--format", "int9"), "format 'int9' is not known"),
        (("up", model, "--format", "int4-g16", "--plan", "p.json"), "give either"),
        (("up", model, "--method", "magic"), "magic"),
    ):
        assert reason in invoke(*arguments, "--port", "0", code=2)


def test_the_table_says_which_path_runs_and_how_the_memory_is_divided(model, tmp_path, invoke, monkeypatch):
    from expertflow_quant.runtime import memory
    from expertflow_quant.serve import launch

    quantize.quantize_model(model, tmp_path / "q", method="rtn", plan="int4-g16")
    options = ("--port", "0", "--device", "cpu", "--expert-memory", "50%")
    output = invoke("serve", tmp_path / "q", *options, "--fast", "--context", "100")
    assert re.search(r"path +fast: decode not captured, prompts streamed", output)
    assert re.search(r"context +100 tokens, prompt and answer", output)
    assert re.search(r"on the device +[0-9.]+ KiB in [1-7] slots", output)
    assert "placing experts" in output
    assert "plain: the fast path was turned off" in invoke("serve", tmp_path / "q", *options, "--no-fast")
    needs = memory.Needs(1, 2, 1, 4, 5, 6, 7, 800, 9)
    load = launch.load

    def promised(folder, *arguments, gpu_memory, on_pinned, **options):
        assert gpu_memory == "9GiB"
        on_pinned(5, 10)
        engine = load(folder, *arguments, **options)
        engine.memory_plan = memory.plan_memory(9 << 30, needs)
        return engine

    monkeypatch.setattr(launch, "load", promised)
    output = invoke("serve", tmp_path / "q", *options, "--gpu-memory", "9GiB")
    assert "device memory" in output
    assert re.search(r"KV cache +8 B +1 rows of 4 tokens", output)
    assert re.search(r"all +9.0 GiB +--gpu-memory", output)


def test_a_taken_port_is_known_before_anything_is_loaded(model, invoke):
    with contextlib.closing(server.bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = invoke("serve", "no-such-folder", "--port", port, code=2)
    assert f"cannot listen on 127.0.0.1:{port}" in output
    assert "--port 0 takes any free one" in output


@pytest.mark.skipif(os.name == "nt", reason="runs a shell")
def test_the_curl_example_is_a_request(data_url, tmp_path):
    """The shown command, with `cat` for curl: a shell makes the JSON of it that this server reads."""
    from PIL import Image

    from expertflow_quant.serve.banner import curl_example
    from expertflow_quant.serve.images import decode_images
    from expertflow_quant.serve.limits import Limits
    from expertflow_quant.serve.schema import parse_chat_request

    noise = Image.effect_noise((300, 300), 80)
    noise.save(tmp_path / "chart.png")
    shown = curl_example("a$b`c\\d", "http://127.0.0.1:1/v1")
    head, mark, rest = shown.partition(" <<JSON")
    assert head.endswith("-d @-")
    body = subprocess.run(["sh", "-c", f"cat{mark}{rest}"], cwd=tmp_path, capture_output=True, check=True).stdout
    request = parse_chat_request(body)
    assert request.model == "a$b`c\\d"
    (image,) = decode_images([request.messages[0].content[0].image_url.url], Limits())
    assert image.convert("L").tobytes() == noise.tobytes()
    assert io.BytesIO(body).getbuffer().nbytes > 60_000


def test_without_the_extra_packages_the_remedy_is_told(model, invoke, monkeypatch):
    for name in ("launch", "app"):
        monkeypatch.delitem(sys.modules, f"expertflow_quant.serve.{name}")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for command in ("serve", "up"):
        output = invoke(command, model, code=2)
        assert "serving needs fastapi: pip install 'expertflow-quant[serve]'" in output
