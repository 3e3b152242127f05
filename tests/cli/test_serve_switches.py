"""What ``serve`` and ``up`` take of the cache and of the token scheduler arrives where the engine is loaded."""

import pytest
from typer.testing import CliRunner

from expertflow_quant.formats.errors import ExpertFlowError

pytest.importorskip("uvicorn")

from expertflow_quant.cli.main import app
from expertflow_quant.runtime.schedule import PATIENCE
from expertflow_quant.serve import launch

SWITCHES = {
    "--policy": ("policy", "lfu"),
    "--predictor": ("predictor", "next-gate"),
    "--ahead": ("ahead", 1.5),
    "--usage": ("usage", "run.safetensors"),
    "--slots": ("slots", "plan.slots.json"),
    "--batch": ("batch", 8),
    "--schedule": ("schedule", "words"),
    "--patience": ("patience", 2),
}


@pytest.mark.parametrize("command", ["serve", "up"])
def test_every_switch_arrives(command, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    seen = []
    monkeypatch.setattr(launch, "launch", lambda checkpoint, name, options, console: seen.append(options))
    given = [part for flag, (_, value) in SWITCHES.items() for part in (flag, str(value))]
    outcome = CliRunner().invoke(app, [command, str(tmp_path), *given])
    assert outcome.exit_code == 0, outcome.output
    for name, value in SWITCHES.values():
        assert str(getattr(seen[0], name)) == str(value)


def test_options_are_checked_before_anything_is_loaded():
    for given, message in (
        ({"batch": 0}, "batch 0 must be at least 1"),
        ({"patience": -1}, "patience -1"),
        ({"schedule": "best"}, "'best' is not known: use one of auto, paths, words, arrival"),
        ({"schedule": "paths"}, "--schedule paths chooses who is answered together.* give --batch 2 or more"),
    ):
        with pytest.raises(ExpertFlowError, match=message):
            launch.Options(**given)
    assert (launch.Options().batch, launch.Options().schedule, launch.Options().patience) == (1, "auto", PATIENCE)


def test_the_engine_is_loaded_with_them(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(launch, "load", lambda *args, **named: seen.update(named))
    launch._loaded(tmp_path, launch.Options(policy="lru", ahead=2.0, slots=tmp_path, batch=4), launch.Console())
    assert (seen["policy"], seen["ahead"], seen["slots"], seen["rows"]) == ("lru", 2.0, tmp_path, 4)
    assert seen["predictor"] is None
