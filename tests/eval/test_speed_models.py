"""Named shapes have the published sizes; random models and records are finite, differ, and leave nothing on meta."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.speed.random_model import meta_model, moe_layers, random_backbone, random_whole
from eval.speed.random_records import RandomLayer, RandomRecords
from eval.speed.routing import ForcedRoutes
from eval.speed.shapes import SHAPES, TINY_LAYERS, named_shape
from expertflow_quant.formats import ExpertFlowError, ExpertShape, Format, RecordLayout
from expertflow_quant.kernels import expert_weights
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.experts import LayerExperts, attach

CPU = torch.device("cpu")
PUBLISHED = {  # layers, hidden, intermediate, experts, top_k, billions of parameters
    "Qwen3-VL-30B-A3B": (48, 2048, 768, 128, 8, 31.07),
    "Qwen3-30B-A3B": (48, 2048, 768, 128, 8, 30.53),
    "Mixtral-8x7B": (32, 4096, 14336, 8, 2, 46.70),
    "OLMoE": (16, 2048, 1024, 64, 8, 6.92),
    "gpt-oss-20b": (24, 2880, 2880, 32, 4, 20.91),
}


def test_every_named_shape_is_checked_here():
    assert set(PUBLISHED) == set(SHAPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_sizes(name):
    layers, hidden, intermediate, experts, top_k, billions = PUBLISHED[name]
    shape = named_shape(name)
    model = meta_model(shape.config, torch.bfloat16)
    found = moe_layers(model)
    assert len(found) == shape.layers == shape.whole_layers == layers
    assert {(f.shape.hidden, f.shape.intermediate, f.experts, f.top_k) for f in found} == {
        (hidden, intermediate, experts, top_k)
    }
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    RecordLayout(found[0].shape, Format.parse(shape.format))


@pytest.mark.parametrize("name", SHAPES)
def test_fewer_layers_are_the_first_ones_of_the_same_model(name):
    cut = named_shape(name, layers=1)
    assert (cut.layers, cut.whole_layers) == (1, PUBLISHED[name][0])
    assert len(moe_layers(meta_model(cut.config, torch.bfloat16))) == 1


def test_a_name_or_a_number_of_layers_that_does_not_exist_is_refused():
    with pytest.raises(ExpertFlowError, match="Mixtral-8x7B"):
        named_shape("Mixtral")
    for layers in (0, 33):
        with pytest.raises(ExpertFlowError, match="32 layers"):
            named_shape("Mixtral-8x7B", layers=layers)


@pytest.mark.parametrize("name", SHAPES)
def test_a_random_backbone_with_random_records_gives_finite_answers_of_ordinary_size(name):
    shape = named_shape(name, tiny=True)
    made = random_backbone(shape.config, CPU, torch.float32, seed=3)
    assert len(made.layers) == TINY_LAYERS
    assert not any(t.is_meta for t in (*made.model.parameters(), *made.model.buffers()))
    assert not any("gate_up_proj" in parameter for parameter, _ in made.model.named_parameters())
    logits = []
    for format in (shape.format, "bf16", "int8-channel-asym"):
        store = ExpertStore(RandomRecords.of(made.layers, Format.parse(format)))
        cache = ExpertCache(store, store.nbytes)
        for index, layer in enumerate(made.layers):
            attach(layer.module, LayerExperts(layer=index, cache=cache))
        with torch.inference_mode():
            logits.append(made.model(input_ids=torch.arange(10, 34).view(2, 12)).logits)
        assert logits[-1].isfinite().all()
        assert 0.1 < logits[-1].std() < 10
        assert cache.stats.requests > 0
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", SHAPES)
def test_rotary_frequencies_are_those_of_a_model_that_was_built_as_usual(name):
    from expertflow_quant.models.seams import model_class

    config = named_shape(name, tiny=True).config
    usual = dict(model_class(config)(config).named_buffers())
    ours = dict(random_backbone(config, CPU, torch.float32).model.named_buffers())
    assert set(ours) == set(usual)
    for name, buffer in usual.items():
        torch.testing.assert_close(ours[name], buffer, rtol=0, atol=0)


def test_a_whole_model_keeps_its_experts_and_is_the_same_for_the_same_seed():
    shape = named_shape("OLMoE", tiny=True)
    first, again = (random_whole(shape.config, CPU, torch.float32, seed=5) for _ in range(2))
    for (name, one), (_, other) in zip(first.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with torch.inference_mode():
        assert first.model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_tied_weights_stay_tied():
    config = named_shape("Qwen3-30B-A3B", tiny=True).config
    config.tie_word_embeddings = True
    model = random_backbone(config, CPU, torch.float32).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


FORMATS = ("bf16", "int8-g16", "int4-g16-asym", "int3-g16", "int2-channel")


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(FORMATS), bias=st.booleans(), gate=st.booleans(), scale=st.booleans(), seed=st.integers(0, 9)
)
def test_random_records_are_finite_and_keep_the_size_of_what_they_multiply(format, bias, gate, scale, seed):
    shape = ExpertShape(64, 48, has_gate=gate, has_bias=bias)
    layout = RecordLayout(shape, Format.parse(format), scale and format != "bf16")
    source = RandomRecords([RandomLayer("layer", shape, 2, (layout,) * 3)], seed)
    records = [source.record(0, expert) for expert in range(3)]
    for record in records:
        assert record.shape == (layout.nbytes,)
        assert all(view.float().isfinite().all() for view in layout.views(record).values())
        weights = expert_weights(layout.views(record), layout, torch.float32)
        for matrix in (weights.gate_up, weights.down):
            assert 0.5 < matrix.std() * matrix.shape[1] ** 0.5 < 2
    assert not torch.equal(records[0], records[1])
    assert torch.equal(source.record(0, 1), records[1])


def test_records_are_made_from_one_template_for_each_layout():
    made = random_backbone(named_shape("OLMoE", tiny=True).config, CPU, torch.float32)
    source = RandomRecords.of(made.layers, Format.parse("int4-g16"))
    for layer, records in enumerate(source.layers):
        for expert in range(len(records.layouts)):
            source.record(layer, expert)
    assert len(source._templates) == 1


def test_a_format_that_does_not_divide_is_refused():
    made = random_backbone(named_shape("OLMoE", tiny=True).config, CPU, torch.float32)
    with pytest.raises(ExpertFlowError, match="does not divide"):
        RandomRecords.of(made.layers, Format.parse("int4-g128"))


def test_forced_routes_replace_the_router_s_choice_and_nothing_else():
    made = random_backbone(named_shape("Mixtral-8x7B", tiny=True).config, CPU, torch.float32)
    seen = []
    forced = ForcedRoutes([layer.module for layer in made.layers])
    for layer in made.layers:
        layer.module.register_forward_pre_hook(lambda module, given: seen.append(given))
    store = ExpertStore(RandomRecords.of(made.layers, Format.parse("bf16")))
    cache = ExpertCache(store, store.nbytes)
    for index, layer in enumerate(made.layers):
        attach(layer.module, LayerExperts(layer=index, cache=cache))
    routes = torch.tensor([[[3, 1]] * 5, [[0, 2]] * 5])
    with torch.inference_mode():
        with pytest.raises(ExpertFlowError, match="no routes"):
            made.model(input_ids=torch.arange(5)[None])
        forced.set(routes)
        made.model(input_ids=torch.arange(5)[None])
        assert [given[1].tolist() for given in seen] == routes.tolist()
        assert all(given[2].sum(dim=-1).allclose(torch.ones(5)) for given in seen)
        with pytest.raises(ExpertFlowError, match="the routes are"):
            made.model(input_ids=torch.arange(6)[None])
        forced.remove()
        made.model(input_ids=torch.arange(6)[None])
    assert seen[-1][1].shape == (6, 2)
