"""quantize, inspect and verify as they are typed: what they print, where, and the exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny
from typer.testing import CliRunner

from expertflow_quant.checkpoint import CheckpointReader, CheckpointWriter
from expertflow_quant.cli.main import app
from expertflow_quant.cli.tables import size

ROOT = Path(__file__).parents[2]
runner = CliRunner(env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-moe")
    tiny.tiny_model("qwen3_vl_moe").save_pretrained(folder)
    tiny.save_processor("qwen3_vl_moe", folder)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    talk = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(6)]
    (folder / "talk.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in talk))
    return folder


def test_quantize_inspect_verify(model: Path, samples: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = ["--method", "gptq", "--format", "int4-g16", "--samples", str(samples), "--num-samples", "4"]
    made = runner.invoke(app, ["quantize", str(model), out, *options])
    assert made.exit_code == 0, made.output
    assert f"{model.name} by gptq" in made.stdout
    assert "error: of an expert's output on its calibration tokens" in made.stdout
    assert "of experts in" in made.stdout
    manifest = CheckpointReader(out).manifest
    assert manifest.made["calibration"]["samples"] == 4  # type: ignore[index]
    shown = runner.invoke(app, ["inspect", out])
    assert shown.exit_code == 0
    assert "int4-g16" in shown.stdout
    figures = json.loads(runner.invoke(app, ["inspect", out, "--json"]).stdout)
    assert figures["expert_bytes"] == manifest.expert_bytes
    assert [len(layer["experts"]) for layer in figures["layers"]] == [8, 8]
    checked = runner.invoke(app, ["verify", out])
    assert (checked.exit_code, "all as the manifest says" in checked.stdout) == (0, True)


def test_generated_items_are_the_default(model: Path, tmp_path: Path) -> None:
    made = runner.invoke(
        app, ["quantize", str(model), str(tmp_path / "a"), "--format", "int4-g16", "--num-samples", "2"]
    )
    assert made.exit_code == 0, made.output
    assert CheckpointReader(tmp_path / "a").manifest.made["method"] == "awq"
    assert "experts saw few tokens" in made.stdout.replace("\n", " ")


def test_a_plan_file(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"default": "int8-g16", "layers": {"0": {"3": "int2-g16", "7": "bf16"}}}))
    out = tmp_path / "out"
    made = runner.invoke(app, ["quantize", str(model), str(out), "--method", "rtn", "--plan", str(plan)])
    assert made.exit_code == 0, made.output
    assert "error: of the weights" in made.stdout
    layouts = CheckpointReader(out).layers[0].layouts
    assert [layouts[expert].format.name for expert in (0, 3, 7)] == ["int8-g16", "int2-g16", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "OUT", "--format", "int5-g16"], "'int5-g16' is not known"),
        (["quantize", "MODEL", "OUT", "--method", "magic"], "'magic' is not known: use one of awq"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g16", "--plan", "x.json"], "both given"),
        (["quantize", "MODEL", "OUT", "--plan", "gone.json"], "gone.json"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g16", "--samples", "gone"], "neither a folder"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g16", "--scales", "median"], "'median' is not known"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g16", "--device", "abacus"], "'abacus' is not known"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g16", "--device", "mps"], "'mps' is not supported"),
        (["quantize", "MODEL", "OUT", "--format", "int4-g32"], "does not divide 48"),
        (["quantize", "gone", "OUT"], "holds no config.json"),
        (
            ["quantize", "MODEL", "OUT", "--method", "rtn", "--pool", "9"],
            "--pool 9 was given, but rtn calibrates on nothing",
        ),
        (["quantize", "MODEL", "OUT", "--method", "rtn", "--text-share", "0"], "--text-share 0.0 was given, but rtn"),
        (["quantize", "MODEL", "MODEL", "--method", "rtn", "--format", "bf16"], "not a checkpoint's"),
        (["inspect", "MODEL"], "no finished expertflow checkpoint"),
        (["verify", "MODEL"], "no finished expertflow checkpoint"),
    ],
)
def test_errors_are_one_message_and_code_2(arguments: list[str], message: str, model: Path, tmp_path: Path) -> None:
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    result = runner.invoke(app, [places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_finished_and_damaged_checkpoints(model: Path, tmp_path: Path) -> None:
    command = ["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--format", "int4-g16"]
    assert runner.invoke(app, command).exit_code == 0
    again = runner.invoke(app, command)
    assert (again.exit_code, "give --overwrite" in again.stderr) == (2, True)
    assert runner.invoke(app, [*command, "--overwrite"]).exit_code == 0
    victim = tmp_path / "out" / "experts" / "layer-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    broken = runner.invoke(app, ["verify", str(tmp_path / "out")])
    assert broken.exit_code == 2
    assert "layer-00001.safetensors has sha256" in broken.stderr


def test_interrupted_says_how_to_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    command = ["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--format", "int4-g16"]
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", stop)
        stopped = runner.invoke(app, command)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    again = runner.invoke(app, command)
    assert again.exit_code == 0
    assert "2 layers kept from an earlier run" in again.stdout


def test_as_a_process_without_a_terminal(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expertflow_quant.cli.main"]
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--method", "rtn", "--format", "int4-g16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KiB of experts in" in done.stdout
    assert "16/16" in done.stderr  # the progress bar keeps out of stdout


def test_sizes_as_people_read_them() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
