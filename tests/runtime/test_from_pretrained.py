"""Checkpoints through transformers' own from_pretrained, for every family, format and budget."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny

from expertflow_quant import ExpertFlowConfig, ExpertFlowError
from expertflow_quant.checkpoint.errors import CheckpointError
from expertflow_quant.models.seams import expert_modules
from expertflow_quant.offload.budget import BudgetError

MIXED = ("int4-g16", "bf16", "int3-g16-asym", "int8-channel", "int2-g16")


def mixed(layer, expert):
    return MIXED[(layer + expert) % 5]


def auto(family):
    if family == "qwen3_vl_moe":
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def opened(family, folder, **options):
    if not options:
        return auto(family).from_pretrained(folder, dtype=torch.float32)
    config = ExpertFlowConfig(**options)
    with warnings.catch_warnings(action="ignore"):  # transformers says that loading options override
        return auto(family).from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def tokens(model, inputs, count=6):
    return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)


@pytest.fixture(scope="module")
def mixed_checkpoints(tmp_path_factory):
    """Per family: its random model and a mixed checkpoint of it, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            model = tiny.tiny_model(family)
            folder = tmp_path_factory.mktemp("mixed") / family
            made[family] = (model, tiny.write_checkpoint(model, folder, mixed))
        return made[family]

    return get


@pytest.fixture
def copied(mixed_checkpoints, tmp_path):
    """A qwen3_moe checkpoint that a test may damage."""
    _, folder = mixed_checkpoints("qwen3_moe")
    target = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, target], check=True)
    return target


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_a_plain_model_with_the_decoded_weights(family, mixed_checkpoints):
    model, folder = mixed_checkpoints(family)
    ours, inputs = opened(family, folder), tiny.model_inputs(family)
    twin = tiny.dequantized(model, mixed)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens(ours, inputs), tokens(twin, inputs))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokens_are_the_same_at_any_budget(family, mixed_checkpoints):
    _, folder = mixed_checkpoints(family)
    inputs = tiny.model_inputs(family, rows=3)
    full = opened(family, folder)
    wanted = tokens(full, inputs)
    assert full.expert_cache.stats.misses == 0
    assert full.expert_cache.device_bytes == full.expert_cache.store.nbytes
    minimum = full.expert_cache.minimum_bytes
    for memory in (minimum, max(minimum, full.expert_cache.store.nbytes // 4)):
        small = opened(family, folder, expert_memory=memory)
        assert small.expert_cache.device_bytes <= memory
        assert torch.equal(tokens(small, inputs), wanted)
        stats = small.expert_cache.stats
        assert stats.requests == full.expert_cache.stats.requests
        assert stats.bytes_moved > 0 or stats.misses == 0


@pytest.mark.parametrize("format", ["int4-g16", "int8-g16", "int2-g16"])
def test_a_quarter_of_the_experts_gives_the_same_tokens(format, tmp_path):
    folder = tiny.write_checkpoint(tiny.tiny_model("qwen3_vl_moe"), tmp_path / "q", lambda layer, expert: format)
    inputs = tiny.model_inputs("qwen3_vl_moe", rows=4)
    full, quarter = opened("qwen3_vl_moe", folder), opened("qwen3_vl_moe", folder, expert_memory="25%")
    assert quarter.expert_cache.device_bytes * 4 == full.expert_cache.device_bytes
    assert torch.equal(tokens(full, inputs, 12), tokens(quarter, inputs, 12))
    assert quarter.expert_cache.stats.misses > 0


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_bf16_records_equal_the_plain_model(family, tmp_path):
    model = tiny.bf16_experts(tiny.tiny_model(family))
    folder = tiny.write_checkpoint(model, tmp_path / "q", lambda layer, expert: "bf16")
    ours, inputs = opened(family, folder), tiny.model_inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(tokens(ours, inputs), tokens(model, inputs))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss", "nemotron_h"])
def test_an_input_scale_multiplies_the_activation(family, tmp_path):
    model = tiny.tiny_model(family)
    folder = tiny.write_checkpoint(model, tmp_path / "q", mixed, input_scale=True)
    twin, inputs = tiny.dequantized(model, mixed, input_scale=True), tiny.model_inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(opened(family, folder)(**inputs).logits, twin(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_experts_are_never_weights_of_the_model(mixed_checkpoints):
    model, folder = mixed_checkpoints("qwen3_moe")
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    experts = [name for name, _ in ours.named_parameters() if ".experts." in name]
    assert experts == []
    plain = sum(p.numel() for _, module in expert_modules(model) for p in module.parameters())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) - plain
    assert set(ours.get_experts_implementation().values()) == {"expertflow"}


def test_the_config_carries_the_expert_memory_too(mixed_checkpoints):
    _, folder = mixed_checkpoints("qwen3_moe")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["expert_memory"] = "75%"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert model.expert_cache.device_bytes <= model.expert_cache.store.nbytes * 3 // 4
    saved = json.loads(model.config.to_json_string())
    assert saved["quantization_config"] == {"quant_method": "expertflow", "version": 1}
    assert "transformers_weights" not in saved


def test_a_model_without_its_head_finds_its_experts(mixed_checkpoints):
    model, folder = mixed_checkpoints("qwen3_moe")
    inputs = tiny.model_inputs("qwen3_moe")
    bare = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = tiny.dequantized(model, mixed).model(**inputs).last_hidden_state
        torch.testing.assert_close(bare(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_a_sharded_backbone_loads(tmp_path):
    model = tiny.tiny_model("qwen3_moe")
    folder = tiny.write_checkpoint(model, tmp_path / "q", mixed, shard_bytes=100_000)
    assert (folder / "backbone.safetensors.index.json").is_file()
    inputs = tiny.model_inputs("qwen3_moe")
    with torch.no_grad():
        wanted = tiny.dequantized(model, mixed)(**inputs).logits
        torch.testing.assert_close(opened("qwen3_moe", folder)(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_without_this_package_loading_fails_instead_of_inventing_experts(mixed_checkpoints):
    _, folder = mixed_checkpoints("qwen3_moe")
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except OSError as error: print('refused:', error)\n"
        "assert 'expertflow_quant' not in sys.modules\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry) != Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(folder)],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused: Error no file named model.safetensors")


def test_saving_again_is_refused_with_the_remedy(mixed_checkpoints, tmp_path):
    _, folder = mixed_checkpoints("qwen3_moe")
    with pytest.raises(ExpertFlowError, match=f"copy the checkpoint folder {folder} instead"):
        opened("qwen3_moe", folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_quantizing_while_loading_is_refused(tmp_path):
    tiny.tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ExpertFlowError, match="expertflow-quant quantize MODEL OUT"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ExpertFlowConfig())


def test_a_budget_below_the_minimum_is_refused_while_loading(mixed_checkpoints):
    _, folder = mixed_checkpoints("qwen3_moe")
    with pytest.raises(BudgetError, match=r"expert memory 4\.0 KiB holds 0 experts.*raise --expert-memory to"):
        opened("qwen3_moe", folder, expert_memory="4 KiB")


def test_several_devices_are_refused(mixed_checkpoints):
    _, folder = mixed_checkpoints("qwen3_moe")
    with pytest.raises(ExpertFlowError, match="share one cache on one device"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("file", ["experts/layer-00001.safetensors", "backbone.safetensors", "config.json"])
def test_one_flipped_bit_is_found_before_anything_runs(copied, file):
    content = bytearray((copied / file).read_bytes())
    content[-2 if file != "config.json" else content.index(b'"hidden_size"') + 1] ^= 1
    (copied / file).write_bytes(content)
    with pytest.raises((CheckpointError, ExpertFlowError), match=f"{file} has sha256"):
        opened("qwen3_moe", copied)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_cut_or_missing_shard_is_found_without_reading_it(copied, damage):
    shard = copied / "experts" / "layer-00001.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 300)
    with pytest.raises(
        CheckpointError, match="layer-00001.safetensors " + ("is missing" if damage == "missing" else "has")
    ):
        opened("qwen3_moe", copied, verify=False)


def test_a_format_that_this_build_does_not_know_is_named(copied):
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace('"int3-g16-asym"', '"nf5-g16"'))
    with pytest.raises(ExpertFlowError, match="format 'nf5-g16' is not known"):
        opened("qwen3_moe", copied)


@pytest.mark.parametrize("odd", [{"version": 2}, {"shape": "round"}])
def test_a_config_that_asks_for_what_is_not_implemented_is_refused(odd, tmp_path):
    model = tiny.tiny_model("qwen3_moe")
    asked = {"quantization_config": {"quant_method": "expertflow", **odd}}
    folder = tiny.write_checkpoint(model, tmp_path / "q", mixed, config=asked)
    with pytest.raises(ExpertFlowError, match=f"has .*{next(iter(odd))}"):
        opened("qwen3_moe", folder)


def test_a_copied_model_shares_the_experts(mixed_checkpoints):
    _, folder = mixed_checkpoints("qwen3_moe")
    inputs, model = tiny.model_inputs("qwen3_moe"), opened("qwen3_moe", folder)
    twin = copy.deepcopy(model)
    assert twin.expert_cache is model.expert_cache
    assert torch.equal(tokens(twin, inputs), tokens(model, inputs))


@pytest.mark.parametrize("change", ["narrower", "shorter", "fewer"])
def test_a_config_of_another_model_is_refused(change, tmp_path):
    model = tiny.tiny_model("qwen3_moe")
    overrides = {
        "narrower": {"moe_intermediate_size": 32},
        "shorter": {"num_hidden_layers": 1},
        "fewer": {"num_experts_per_tok": 1},
    }
    folder = tiny.write_checkpoint(model, tmp_path / "q", mixed, config=overrides[change])
    with pytest.raises(ExpertFlowError, match=r"restore config\.json or quantize again"):
        opened("qwen3_moe", folder)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe", "gpt_oss"])
def test_on_a_gpu_tokens_are_the_same_at_any_budget(family, mixed_checkpoints):
    _, folder = mixed_checkpoints(family)
    inputs = {name: value.cuda() for name, value in tiny.model_inputs(family, rows=3).items()}
    options = {"dtype": torch.float32, "device_map": "cuda"}
    full = auto(family).from_pretrained(folder, **options)
    least = ExpertFlowConfig(expert_memory=full.expert_cache.minimum_bytes)
    with warnings.catch_warnings(action="ignore"):
        small = auto(family).from_pretrained(folder, quantization_config=least, **options)
    assert small.expert_cache.device.type == "cuda"
    assert torch.equal(tokens(full, inputs), tokens(small, inputs))
    assert small.expert_cache.stats.misses > 0
