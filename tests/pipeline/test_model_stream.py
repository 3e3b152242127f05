"""Streamed weights equal what from_pretrained loads, for every layout that checkpoints come in."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from expertflow_quant.checkpoint import CheckpointError
from expertflow_quant.checkpoint.tensors import write_tensors
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.models.seams import expert_parameters
from expertflow_quant.pipeline.stream import ModelStream

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2
    )


def mixtral() -> Any:
    return transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)


def olmoe() -> Any:
    return transformers.OlmoeConfig(**SIZES, intermediate_size=32, num_experts=6, num_experts_per_tok=2)


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **SIZES,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )


def deepseek_v3() -> Any:
    return transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        intermediate_size=40,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_shared_experts=1,
    )


def qwen3_vl_moe() -> Any:
    text = SIZES | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


CONFIGS = {make.__name__: make for make in (qwen3_moe, mixtral, olmoe, gpt_oss, deepseek_v3, qwen3_vl_moe)}


def auto(config: Any) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def save_random(config: Any, folder: Path, **kwargs: Any) -> Path:
    torch.manual_seed(0)
    model = auto(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder, **kwargs)
    return folder


def assert_streams_like_from_pretrained(folder: Path) -> ModelStream:
    stream = ModelStream(folder)
    loaded = auto(stream.config).from_pretrained(folder, dtype=torch.bfloat16)
    state = loaded.state_dict()
    for layer in stream.layers:
        module = loaded.get_submodule(layer.module)
        for expert in range(layer.experts):
            streamed = stream.expert(layer.index, expert)
            for name, parameter in expert_parameters(module).items():
                want = module.get_parameter(parameter)[expert]
                want = want.T if module.is_transposed and want.ndim == 2 else want
                assert torch.equal(getattr(streamed, name), want), (layer, expert, name)
    for pending in stream.backbone():
        assert torch.equal(pending.read(), state[pending.name]), pending.name
        assert (pending.dtype, pending.shape) == (pending.read().dtype, tuple(pending.read().shape))
    tied = set(getattr(loaded, "all_tied_weights_keys", {}))
    experts = {name for name in state if any(name.startswith(layer.module + ".") for layer in stream.layers)}
    assert {pending.name for pending in stream.backbone()} | tied | experts == set(state) | tied
    return stream


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_weights_equal_loaded_ones(name: str, tmp_path: Path) -> None:
    stream = assert_streams_like_from_pretrained(save_random(CONFIGS[name](), tmp_path))
    assert [layer.top_k for layer in stream.layers] == [2] * len(stream.layers)
    assert len(stream.layers) == (1 if name == "deepseek_v3" else 2)
    assert (stream.layers[0].shape.hidden, stream.layers[0].shape.intermediate) == (48, 32)


def test_hub_layout_of_qwen3_vl_moe_is_transposed_back(tmp_path: Path) -> None:
    folder = save_random(qwen3_vl_moe(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
    assert sum(not torch.equal(turned[k], tensors[k]) if turned[k].shape == tensors[k].shape else 1 for k in turned)
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    assert_streams_like_from_pretrained(folder)


def test_fused_tensors_of_an_architecture_with_per_expert_files(tmp_path: Path) -> None:
    folder = save_random(qwen3_moe(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_streams_like_from_pretrained(folder)


def test_shards_and_the_base_model_without_its_prefix(tmp_path: Path) -> None:
    folder = save_random(qwen3_moe(), tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    stream = assert_streams_like_from_pretrained(folder)
    stream.close()
    assert stream.expert(1, 5).gate_up.shape == (64, 48)


def test_backbone_file_loads_by_the_models_own_names(tmp_path: Path) -> None:
    stream = ModelStream(save_random(qwen3_vl_moe(), tmp_path))
    write_tensors(tmp_path / "backbone.safetensors", stream.backbone())
    written = load_file(tmp_path / "backbone.safetensors")
    names = dict(stream.model.named_parameters())
    assert set(written) <= set(names)
    assert not any(".experts." in name for name in written)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_random(qwen3_moe(), tmp_path, max_shard_size="20KB")
    gone = sorted(folder.glob("model-*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        ModelStream(folder)


def test_unreadable_shard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ModelStream(save_random(qwen3_moe(), tmp_path))

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(
            CheckpointError, match=r"experts\.5\.gate_proj\.weight from .*model\.safetensors: Input/output"
        ):
            stream.expert(1, 5)
    assert stream.expert(1, 5).gate_up.shape == (64, 48)


def test_rows_of_a_tensor(tmp_path: Path) -> None:
    stream = ModelStream(save_random(qwen3_moe(), tmp_path))
    table = stream.parameter("model.embed_tokens.weight")
    assert torch.equal(stream.rows("model.embed_tokens.weight", [5, 0, 95]), table[[5, 0, 95]])
    with pytest.raises(CheckpointError, match="96 entries, not one 96"):
        stream.rows("model.embed_tokens.weight", [96])


def test_held_experts_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ModelStream(save_random(qwen3_moe(), tmp_path))
    wanted = stream.expert(1, 2)
    stream.hold([1])
    with monkeypatch.context() as patched:
        patched.setattr(stream.shards, "read", lambda *args: pytest.fail("read again"))
        assert torch.equal(stream.expert(1, 2).gate_up, wanted.gate_up)
        with pytest.raises(pytest.fail.Exception):
            stream.expert(0, 2)
    stream.hold([])
    assert torch.equal(stream.expert(1, 2).down, wanted.down)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = save_random(qwen3_moe(), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        ModelStream(folder)


@pytest.mark.parametrize("victim", ["experts.5.up_proj.weight", "q_proj.weight"])
def test_missing_tensor_is_an_error_and_never_random_numbers(victim: str, tmp_path: Path) -> None:
    folder = save_random(qwen3_moe(), tmp_path)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith(victim)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks"):
        ModelStream(folder)


def test_dense_model_and_pickle_files_are_refused(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SIZES, head_dim=16, intermediate_size=32)
    folder = save_random(config, tmp_path / "dense")
    with pytest.raises(ExpertFlowError, match="no experts module"):
        ModelStream(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        ModelStream(folder)
