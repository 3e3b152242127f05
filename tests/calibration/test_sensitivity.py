"""Damages at predictions against the divergence itself, the modalities' shares, the file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from calibration.__main__ import app
from calibration.sensitivity import Checkpoints, Rounded, Settings, measure_sensitivity
from calibration.sensitivity_file import Sensitivity, weights_digest
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import answered_batches
from expertflow_quant.pipeline.quantize import quantize_model
from expertflow_quant.pipeline.samples_io import generated_samples
from expertflow_quant.pipeline.stream import ModelStream
from expertflow_quant.pipeline.teacher import Teacher, divergence

INT4 = Format.parse("int4-g32")


class Nudged:
    """Experts a thousandth of the way to their rounded ones: a change that second order describes, and that sends no
    token to another expert."""

    method = "nudged"

    def __init__(self, teacher):
        self.teacher, self.rounded = teacher, Rounded(teacher, [INT4], "absmax")

    def expert(self, layer, expert, form):
        own, far = self.teacher.own(layer, expert), self.rounded.expert(layer, expert, form)
        parts = {name: getattr(own, name) for name in ("gate_up", "down")}
        return replace(own, **{name: w + 1e-3 * (getattr(far, name) - w) for name, w in parts.items()})


@pytest.fixture(scope="module")
def measured(small_moe):
    """A teacher, its batches, nudged experts, and their damages by many probes."""
    teacher, stream = Teacher(small_moe, dtype=torch.float64), ModelStream(small_moe)
    teacher.model.set_experts_implementation("eager")  # the grouped product knows no float64
    batches = answered_batches(load_processor(small_moe), generated_samples(2), 2)
    nudged = Nudged(teacher)
    found = measure_sensitivity(stream, teacher, batches, nudged, [INT4], Settings(2.0, 64), lambda *at: None)
    return teacher, batches, nudged, found


def softened(log_probs):
    return (log_probs / 2.0).log_softmax(-1)


def test_damage_is_the_divergence_that_changing_one_expert_makes(measured):
    """A mean of 64 random probes at a dozen answer tokens, drawn from one seed: to 40 %."""
    teacher, batches, nudged, found = measured
    exact = [softened(teacher.log_probs(batch)) for batch in batches]
    of_layers = [max((e for e in found.experts if e.layer == at), key=lambda e: e.damage[INT4]) for at in range(6)]
    for expert in of_layers:
        teacher.put(expert.layer, expert.expert, nudged.expert(expert.layer, expert.expert, INT4))
        moved = [softened(teacher.log_probs(batch)) for batch in batches]
        teacher.restore()
        wanted = float(torch.cat([divergence(a, b) for a, b in zip(exact, moved, strict=True)]).mean())
        assert expert.damage[INT4] == pytest.approx(wanted, rel=0.4, abs=0)


def test_last_layers_pictures_move_no_answer(measured):
    """Nothing after the last layer's experts mixes tokens, so only the text that answers can matter there."""
    assert measured[3].text_share[-1] == 1.0
    assert all(0 < share < 1 for share in measured[3].text_share[:-1])


def test_checkpoints_of_rounded_experts_measure_as_rounding_does(small_moe, measured, tmp_path):
    quantize_model(small_moe, tmp_path / "int4", method="rtn", plan=INT4)
    given = Checkpoints([tmp_path / "int4"])
    assert (given.method, given.formats) == ("rtn", [INT4])
    ours, theirs = given.expert(3, 5, INT4), measured[2].rounded.expert(3, 5, INT4)
    torch.testing.assert_close(ours.gate_up, theirs.gate_up)
    torch.testing.assert_close(ours.down, theirs.down)
    quantize_model(small_moe, tmp_path / "bf16", method="rtn", plan="bf16")
    assert Checkpoints([tmp_path / "bf16"]).formats == [Format.parse("bf16")]


@pytest.fixture(scope="module")
def written(small_moe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sensitivity") / "found.json"
    options = ["--samples", "2", "--formats", "int2-g32,int4-g32", "--probes", "1"]
    outcome = CliRunner().invoke(app, ["sensitivity", str(small_moe), "--out", str(path), *options])
    assert outcome.exit_code == 0, outcome.output
    return path


def test_the_file_says_how_it_was_made_and_is_read_back(small_moe, written, tmp_path):
    value = json.loads(written.read_text())
    assert value["model"] == {"name": "moe", "weights": weights_digest(small_moe)}
    assert value["samples"]["source"] == "generated, calibration split, seed 0"
    assert value["measure"]["at"] == "predictions"
    assert value["measure"]["answer_tokens"] > 2
    found = Sensitivity.load(written)
    found.check_model(written, small_moe, [16] * 6)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == written.read_text()
    only = found.chosen(written, [Format.parse("int4-g32")])
    assert [list(e.damage) for e in only] == [[Format.parse("int4-g32")]] * 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is no sensitivity file"),
        ({"version": 2}, "has version 2, this reads 1"),
        ({"formats": ["int2-g32", "int5-g32"]}, "format 'int5-g32' is not known"),
        ({"layers": [{"experts": [{"tokens": 1}]}]}, "is damaged"),
        ({"layers": [{"experts": [{"tokens": 1, "weights": 2, "damage": {"int2-g32": -1, "int4-g32": 0}}]}]}, "is -1"),
    ],
)
def test_a_damaged_file_is_refused(written, tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(ExpertFlowError, match=message):
        Sensitivity.load(path)


def test_another_models_file_is_refused(small_moe, written):
    found = Sensitivity.load(written)
    other = replace(found, origin=replace(found.origin, model={"name": "other", "weights": "0" * 64}))
    with pytest.raises(ExpertFlowError, match="measured on other with weights 000000000000"):
        other.check_model(written, small_moe, [16] * 6)
    with pytest.raises(ExpertFlowError, match=r"has \[16, 16, 16, 16, 16, 16\] experts"):
        found.check_model(written, small_moe, [16] * 5 + [15])


def test_what_cannot_be_measured_is_refused(small_moe, tmp_path):
    command = ["sensitivity", str(small_moe), "--out", str(tmp_path / "f.json"), "--samples", "2"]
    outcome = CliRunner().invoke(app, [*command, "--at", "inputs"], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "use predictions or outputs" in outcome.output
    outcome = CliRunner().invoke(app, [*command, "--temperature", "0"], env={"COLUMNS": "300"})
    assert "must be above zero" in outcome.output
    processor = load_processor(small_moe)
    asked = [{"messages": each["messages"][:1]} for each in generated_samples(1)]
    with pytest.raises(ExpertFlowError, match="sample 0 ends with the turn of the user"):
        answered_batches(processor, asked)


def test_samples_from_files_and_damage_at_outputs(small_moe, tmp_path):
    """Layer by layer, without the model in memory; the samples need no answers there."""
    folder, path = tmp_path / "samples", tmp_path / "outputs.json"
    folder.mkdir()
    asked = [{"messages": [{"role": "user", "content": f"Say {word}."}]} for word in ("one", "two", "three")]
    (folder / "asked.jsonl").write_text("\n".join(json.dumps(each) for each in asked))
    command = ["sensitivity", str(small_moe), "--out", str(path), "--from", str(folder), "--formats", "int2-g32"]
    outcome = CliRunner().invoke(app, [*command, "--at", "outputs"], env={"COLUMNS": "300"})
    assert outcome.exit_code == 0, outcome.output
    found = Sensitivity.load(path)
    assert (found.origin.measure, found.origin.method, found.text_share) == ({"at": "outputs"}, "rtn", [])
    assert found.origin.samples["count"] == 3
    assert found.origin.samples["source"] == "samples"
    assert sum(expert.damage[Format.parse("int2-g32")] for expert in found.experts) > 0
    again = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert "was measured before: delete it" in again.output
    path.unlink()
    outcome = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert "sample 0 ends with the turn of the user" in outcome.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["plan", "MODEL", "-o", "OUT", "--average-bits", "nan"], "--average-bits nan is no number of bits"),
        (["plan", "MODEL", "-o", "OUT", "--average-bits", "0"], "--average-bits 0.0 is no number of bits"),
        (["plan", "MODEL", "-o", "OUT", "--damage", "nan", "--sensitivity", "MEASURED"], "--damage nan is no damage"),
        (["plan", "MODEL", "-o", "OUT", "--method", "foo"], "foo"),
        (["plan", "MODEL", "-o", "MODEL/config.json/plan.json"], "cannot write"),
        (["sensitivity", "MODEL", "--out", "OUT", "--temperature", "nan"], "temperature nan must be above zero"),
    ],
)
def test_what_makes_no_sense_is_refused_first(command, said, small_moe, tmp_path):
    measured = tmp_path / "measured.json"
    if "MEASURED" in command:
        made = ["sensitivity", str(small_moe), "--out", str(measured), "--samples", "1", "--formats", "int2-g32"]
        assert CliRunner().invoke(app, [*made, "--probes", "1"]).exit_code == 0
        command = [*command, "--formats", "int2-g32"]
    places = {"OUT": str(tmp_path / "out.json"), "MEASURED": str(measured)}
    told = [places.get(part, part.replace("MODEL", str(small_moe))) for part in command]
    outcome = CliRunner().invoke(app, told, env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert said in outcome.output
    assert not (tmp_path / "out.json").exists()


def test_checkpoints_of_another_model_are_refused(small_moe, tmp_path):
    quantize_model(small_moe, tmp_path / "own", method="rtn", plan="int2-g32")
    Checkpoints([tmp_path / "own"]).check_model(ModelStream(small_moe))
    other = tmp_path / "other"
    other.mkdir()
    for file in small_moe.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    weights = {
        name: value * (2 if ".experts." in name else 1)
        for name, value in load_file(small_moe / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    quantize_model(other, tmp_path / "theirs", method="rtn", plan="int8-g32")
    command = ["sensitivity", str(small_moe), "--out", str(tmp_path / "found.json"), "--samples", "1", "--probes", "1"]
    outcome = CliRunner().invoke(app, [*command, "--quantized", str(tmp_path / "theirs")], env={"COLUMNS": "300"})
    assert outcome.exit_code == 1
    assert "the int8-g32 checkpoint's first expert is" in outcome.output
    assert not (tmp_path / "found.json").exists()
