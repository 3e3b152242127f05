"""Whole runs: every method and family into a checkpoint that reads back, mixed plans, errors that are
true."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file

from expertflow_quant.checkpoint import CheckpointReader, Plan, ResumeError
from expertflow_quant.checkpoint.files import hash_file
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.kernels import expert_product, expert_weights
from expertflow_quant.models.seams import expert_modules, expert_parameters
from expertflow_quant.pipeline import methods
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.methods import METHODS, MethodOptions
from expertflow_quant.pipeline.observe import Observations, ObserveOptions
from expertflow_quant.pipeline.quantize import QuantizeReport, quantize_model
from expertflow_quant.pipeline.stream import ModelStream

INT4, INT2 = Format.parse("int4-g16"), Format.parse("int2-g16-asym")


def save_model(family: str, folder: Path) -> Path:
    tiny.tiny_model(family).save_pretrained(folder)
    tiny.save_processor(family, folder)
    return folder


def observe(stream: ModelStream, family: str, **options: Any) -> Observations:
    batches = [tiny.model_inputs(family, rows=4, length=24, seed=seed) for seed in range(3)]
    data = CalibrationData.from_batches(batches)
    return Observations(stream, data, ObserveOptions(**{"min_tokens": 16, **options}), keep=True)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def mean_error(report: QuantizeReport) -> float:
    return sum(entry.error for *_, entry in report.experts) / len(report.experts)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_by_every_method(family: str, tmp_path: Path) -> None:
    stream = ModelStream(save_model(family, tmp_path / "model"))
    observations = observe(stream, family)
    errors = {}
    for method in METHODS:
        report = quantize_model(stream, tmp_path / method, method=method, plan="int4-g16", observations=observations)
        reader = CheckpointReader(tmp_path / method)
        reader.verify(full=True)
        assert reader.manifest == report.manifest
        assert [layer.module for layer in reader.layers] == [layer.module for layer in stream.layers]
        assert all(entry.format == INT4 for *_, entry in report.experts)
        assert all(entry.input_scale == (method == "awq") for *_, entry in report.experts)
        errors[method] = mean_error(report)
    assert errors["awq"] <= errors["rtn"]
    assert errors["gptq"] < errors["rtn"] < 0.2


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss", "nemotron_h"])
def test_bf16_records_are_the_weights(family: str, tmp_path: Path) -> None:
    model = tiny.bf16_experts(tiny.tiny_model(family))
    model.save_pretrained(tmp_path / "model")
    report = quantize_model(tmp_path / "model", tmp_path / "out", method="rtn", plan="bf16")
    reader = CheckpointReader(tmp_path / "out")
    for layer, (_, module) in enumerate(expert_modules(model)):
        for expert in range(int(module.num_experts)):  # type: ignore[arg-type]
            layout = reader.layers[layer].layouts[expert]
            read = expert_weights(layout.views(reader.record(layer, expert)), layout, torch.float32)
            for name, parameter in expert_parameters(module).items():
                want = module.get_parameter(parameter)[expert]
                want = want.T if module.is_transposed and want.ndim == 2 else want
                if not name.endswith("bias"):
                    assert torch.equal(getattr(read, name), want)
                else:
                    torch.testing.assert_close(getattr(read, name), want.bfloat16().float())
    assert mean_error(report) == 0


def test_a_mixed_plan_gives_each_expert_its_format(tmp_path: Path) -> None:
    stream = ModelStream(save_model("qwen3_vl_moe", tmp_path / "model"))
    plan = Plan.parse({"default": "int4-g16", "layers": {"0": {"3": "int2-g16", "5": "bf16"}, "1": "int8-channel"}})
    observations = observe(stream, "qwen3_vl_moe")
    for method in METHODS:
        report = quantize_model(stream, tmp_path / method, method=method, plan=plan, observations=observations)
        reader = CheckpointReader(tmp_path / method)
        reader.verify(full=True)
        for layer, expert, entry in report.experts:
            assert entry.format == plan.format(layer, expert)
            assert reader.record(layer, expert).nbytes == entry.nbytes
        by_format = {entry.format.name: entry.error for *_, entry in report.experts}
        assert by_format["bf16"] < by_format["int8-channel"] < by_format["int4-g16"] < by_format["int2-g16"]


def test_reported_errors_are_those_of_the_records(tmp_path: Path) -> None:
    stream = ModelStream(save_model("mixtral", tmp_path / "model"))
    observations = observe(stream, "mixtral")
    for method in METHODS:
        report = quantize_model(stream, tmp_path / method, method=method, plan=INT2, observations=observations)
        reader = CheckpointReader(tmp_path / method)
        for observed in observations.layers():
            layer = observed.layer.index
            for expert, layout in enumerate(reader.layers[layer].layouts):
                rows = observed.rows(expert).thinned(MethodOptions().max_rows)
                runs = expert_weights(layout.views(reader.record(layer, expert)), layout, torch.float32)
                gate, weight = stream.gate(layer), rows.weights[:, None]
                want = expert_product(rows.inputs, stream.expert(layer, expert), gate) * weight
                got = expert_product(rows.inputs, runs, gate) * weight
                entry = report.manifest.layers[layer].experts[expert]
                assert entry.error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
                assert entry.tokens == rows.tokens


def test_rare_experts_are_reported(tmp_path: Path) -> None:
    stream = ModelStream(save_model("qwen3_moe", tmp_path / "model"))
    report = quantize_model(
        stream, tmp_path / "out", plan=INT4, observations=observe(stream, "qwen3_moe", min_tokens=70)
    )
    counts = [layer.counts for layer in observe(stream, "qwen3_moe").layers()]
    few = {(layer, e) for layer, of in enumerate(counts) for e, count in enumerate(of) if count < 70}
    assert {(layer, expert) for layer, expert, _ in report.rare} == few
    assert len(few) > 0
    assert {entry.coverage for *_, entry in report.rare} == {"closest"}


def test_gptq_in_small_batches_gives_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    stream = ModelStream(save_model("qwen3_moe", tmp_path / "model"))
    observations = observe(stream, "qwen3_moe")
    quantize_model(stream, tmp_path / "whole", method="gptq", plan=INT4, observations=observations)
    monkeypatch.setattr(methods, "BATCH_BYTES", {"cpu": 1})
    quantize_model(stream, tmp_path / "single", method="gptq", plan=INT4, observations=observations)
    names = [name for name in tree(tmp_path / "whole") if name.startswith("experts/")]
    whole, single = (CheckpointReader(tmp_path / name) for name in ("whole", "single"))
    same = total = 0
    for layer in range(len(names)):
        for expert in range(8):
            one, other = whole.record(layer, expert), single.record(layer, expert)
            same, total = same + int((one == other).sum()), total + one.numel()
    assert same / total > 0.999  # batched products may differ in the last bit


def test_weights_beyond_any_scale_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 5] = 3e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExpertFlowError, match=r"^layer 1: expert 2: down: .* use bf16 for this expert, by a plan$"):
        quantize_model(tmp_path / "model", tmp_path / "out", method="rtn", plan="int4-g16")
    plan = Plan(INT4, {1: {2: Format.parse("bf16")}})
    quantize_model(tmp_path / "model", tmp_path / "out", method="rtn", plan=plan, overwrite=True)


def test_the_checkpoint_folder_is_complete(tmp_path: Path) -> None:
    folder = save_model("qwen3_vl_moe", tmp_path / "model")
    (folder / "LICENSE").write_text("free")
    (folder / "weights.bin").write_bytes(b"pickle")
    quantize_model(folder, tmp_path / "out", method="rtn", plan="int4-g16")
    written, source = tree(tmp_path / "out"), tree(folder)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "expertflow", "version": 1}
    assert config == json.loads((folder / "config.json").read_text())
    copied = set(source) - {"config.json", "model.safetensors", "weights.bin"}
    assert {name: written[name] for name in copied} == {name: source[name] for name in copied}
    others = {"config.json", "manifest.json", "backbone.safetensors"}
    assert set(written) == copied | others | {f"experts/layer-0000{layer}.safetensors" for layer in range(2)}
    state = tiny.tiny_model("qwen3_vl_moe").state_dict()
    for name, tensor in load_file(tmp_path / "out/backbone.safetensors").items():
        assert torch.equal(tensor, state[name])
    made = CheckpointReader(tmp_path / "out").manifest.made
    assert str(tmp_path) not in json.dumps(made)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    folder = save_model("qwen3_vl_moe", tmp_path / "model")
    for method in METHODS:
        for run in "ab":
            stream = ModelStream(folder)
            observations = observe(stream, "qwen3_vl_moe")
            quantize_model(stream, tmp_path / method / run, method=method, plan=INT4, observations=observations)
        assert tree(tmp_path / method / "a") == tree(tmp_path / method / "b")


def test_conversations_calibrate_through_the_processor(tmp_path: Path) -> None:
    from PIL import Image

    folder = save_model("qwen3_vl_moe", tmp_path / "model")
    samples = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": Image.effect_noise((32, 32), 60).convert("RGB")},
                        {"type": "text", "text": f"what is {number} here"},
                    ],
                },
                {"role": "assistant", "content": str(number)},
            ]
        }
        for number in range(20)
    ]
    report = quantize_model(folder, tmp_path / "out", plan="int4-g16", samples=samples)
    tokens = sum(entry.tokens for layer, _, entry in report.experts if layer == 0)
    assert tokens > 20 * 2 * 16
    assert report.manifest.made["calibration"]["samples"] == 20  # type: ignore[index]
    text_only = save_model("qwen3_moe", tmp_path / "text")
    talk = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}] * 3
    assert quantize_model(text_only, tmp_path / "out2", plan="int4-g16", samples=talk).expert_bytes > 0
    with pytest.raises(ExpertFlowError, match="sample 0 has an image, but the model reads text only"):
        quantize_model(text_only, tmp_path / "out3", plan="int4-g16", samples=samples)
    wordless = [{"messages": [{"role": "user", "content": [{"type": "image", "image": None}]}]}] * 3
    with pytest.raises(ExpertFlowError, match="sample 0: None is not a PIL image"):
        quantize_model(folder, tmp_path / "out4", plan="int4-g16", samples=wordless)


def test_observations_of_another_model_are_refused(tmp_path: Path) -> None:
    one, other = (ModelStream(save_model("mixtral", tmp_path / name)) for name in ("one", "other"))
    with pytest.raises(ExpertFlowError, match="do not calibrate"):
        quantize_model(one, tmp_path / "out", plan=INT4, observations=observe(other, "mixtral"))
    seen = observe(one, "mixtral")
    with pytest.raises(ExpertFlowError, match="give either"):
        quantize_model(one, tmp_path / "out", plan=INT4, observations=seen, samples=[])


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method: str, tmp_path: Path) -> None:
    stream = ModelStream(save_model("qwen3_vl_moe", tmp_path / "model"))
    batches = [tiny.model_inputs("qwen3_vl_moe", rows=4, length=24, seed=seed) for seed in range(3)]
    data = CalibrationData.from_batches(batches)
    errors = {}
    for device in ("cpu", "cuda"):
        observations = Observations(stream, data, ObserveOptions(), device, torch.float32)
        report = quantize_model(stream, tmp_path / device, method=method, plan=INT4, observations=observations)
        CheckpointReader(tmp_path / device).verify(full=True)
        errors[device] = mean_error(report)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = save_model("qwen3_moe", tmp_path / "model")
    out = tmp_path / "out"
    for kwargs, message in (
        ({"method": "magic"}, "'magic' is not known: use one of awq, gptq, rtn"),
        ({"method": "rtn", "plan": "int4-g32"}, "does not divide 48"),
        ({"method": "rtn", "plan": Plan(INT4, {7: INT4})}, "MoE layer 7"),
        ({"method": "gptq", "plan": INT4, "samples": []}, "no calibration samples"),
    ):
        with pytest.raises(ExpertFlowError, match=message):
            quantize_model(folder, out, **kwargs)  # type: ignore[arg-type]
    assert not out.exists()
    with pytest.raises(ExpertFlowError, match=r"no config\.json"):
        quantize_model(tmp_path / "gone", out)
    with pytest.raises(ResumeError, match="not a checkpoint's"):
        quantize_model(folder, folder, method="rtn", plan=INT4)
    quantize_model(folder, out, method="rtn", plan=INT4)
    with pytest.raises(ResumeError, match="--overwrite"):
        quantize_model(folder, out, method="rtn", plan=INT4)
    quantize_model(folder, out, method="rtn", plan="bf16", overwrite=True)
    with pytest.raises(ExpertFlowError, match="quantized already"):
        quantize_model(out, tmp_path / "twice", method="rtn", plan="bf16")
