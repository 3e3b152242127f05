"""What the host says a model needs, against what tiny models of several families really allocate."""

import weakref

import pytest
import torch
from helpers.tiny import FAMILIES, model_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertflow_quant.models.seams import expert_modules
from expertflow_quant.runtime.memory_needs import backbone_bytes, kv_bytes_per_token, prefill_bytes

SCORED = ("gpt_oss", "deepseek_v3")  # their attention holds scores on the CPU


class Peak(TorchDispatchMode):
    """The most bytes that storages made inside take at once."""

    def __init__(self, known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key, nbytes):
        self.live.discard(key)
        self.now -= nbytes


def prefilled(family, rows, length, dtype):
    """(model, tokens, patches, peak bytes of a prefill besides its KV cache, bytes of the KV cache)."""
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation("eager")
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in model_inputs(family, rows, length).items()
    }
    with torch.no_grad(), Peak([*model.parameters(), *model.buffers(), *inputs.values()]) as peak:
        result = model(**inputs, logits_to_keep=1, use_cache=True)
    layers = [
        layer for layer in result.past_key_values.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return model, inputs["input_ids"].numel(), len(inputs.get("pixel_values", ())), peak.peak - kept, kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "length", "dtype"), [(1, 400, torch.float32), (3, 100, torch.bfloat16)])
def test_a_prefill_stays_below_its_bound_and_not_far(family, rows, length, dtype):
    model, tokens, patches, peak, _ = prefilled(family, rows, length, dtype)
    scored = tokens // rows if family in SCORED else 0
    bound = prefill_bytes(model.config, tokens, dtype, rows, patches, scored)
    assert peak <= bound <= 6 * peak


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_take_so_much_of_a_cache(family):
    model, tokens, _, _, kept = prefilled(family, 2, 100, torch.float32)
    assert kv_bytes_per_token(model.config, torch.float32) * tokens == kept


def test_windowed_layers_count_as_if_they_kept_all():
    model, tokens, _, _, kept = prefilled("gpt_oss", 1, 400, torch.float32)
    assert kept < kv_bytes_per_token(model.config, torch.float32) * tokens <= 2 * kept


def test_the_bound_of_images_alone_covers_the_vision_tower():
    model, _, patches, peak, _ = prefilled("qwen3_vl_moe", 16, 1, torch.float32)
    assert peak <= prefill_bytes(model.config, 16 * 19, torch.float32, 16, patches)
    text = prefill_bytes(model.config, 1, torch.float32)
    assert prefill_bytes(model.config, 1, torch.float32, 1, patches) > 10 * text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_all_but_the_experts(family):
    model = tiny_model(family)
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    experts = sum(parameter.nbytes for _, module in expert_modules(model) for parameter in module.parameters())
    count = sum(1 for _ in (*model.parameters(), *model.buffers()))
    assert total - experts <= backbone_bytes(model) <= total - experts + 512 * count
    taken = backbone_bytes(model)
    model.to("meta").tie_weights()
    assert backbone_bytes(model) == taken


def test_tensors_take_whole_pieces_of_the_allocator():
    sizes = {1: 512, 128: 512, 129: 1024, 3_000_000: 12 * 2**20, 5 * 2**20 + 1: 22 * 2**20}
    for count, taken in sizes.items():
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.empty(count, device="meta"))
        module.tied = module.weight
        assert backbone_bytes(module) == taken
