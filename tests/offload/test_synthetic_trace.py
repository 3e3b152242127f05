"""Drawn routes: popularity against its formula, stickiness against its probability, and their trace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.synthetic_trace import RouteSizes, synthetic_routes, synthetic_trace
from expertflow_quant.offload.trace import GENERATED, PROMPT_TEXT, requests

SIZES = RouteSizes(layers=3, experts=12, top_k=3)


def draw(sizes=SIZES, **options):
    return synthetic_routes(sizes, **({"steps": 20, "rows": 2, "prompt": 4} | options))


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(2, 300),
    top_k=st.integers(1, 2),
    rows=st.integers(1, 3),
    skew=st.floats(0, 3),
    stickiness=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_routes_are_distinct_in_range_and_repeatable(layers, experts, top_k, rows, skew, stickiness, seed):
    sizes = RouteSizes(layers, experts, top_k)
    options = {"rows": rows, "skew": skew, "stickiness": stickiness, "seed": seed}
    prompts, decode = draw(sizes, **options)
    assert prompts.shape == (4, layers, rows, top_k)
    assert decode.shape == (20, layers, rows, top_k)
    for routes in (prompts, decode):
        assert 0 <= int(routes.min()) <= int(routes.max()) < experts
        assert (routes.sort(-1).values.diff(dim=-1) > 0).all()
    assert all(torch.equal(one, other) for one, other in zip(draw(sizes, **options), (prompts, decode)))


def test_popularity_falls_with_rank_as_the_skew_says():
    _, decode = draw(RouteSizes(2, 8, 1), steps=20000, rows=1, prompt=0, skew=1.0)
    wanted = torch.arange(1, 9).float().reciprocal()
    for layer in range(2):
        shares = decode[:, layer].flatten().bincount(minlength=8).sort(descending=True).values / 20000
        assert torch.allclose(shares, wanted / wanted.sum(), atol=0.015)


def test_ranks_differ_between_layers_and_seeds():
    favourite = [
        draw(RouteSizes(8, 64, 1), steps=60, rows=1, prompt=0, skew=4.0, seed=seed)[1].mode(0).values.flatten().tolist()
        for seed in (0, 1)
    ]
    assert len(set(favourite[0])) > 4
    assert favourite[0] != favourite[1]


@pytest.mark.parametrize("stickiness", [0.25, 0.8])
def test_each_expert_stays_with_the_given_probability(stickiness):
    sizes = RouteSizes(2, 512, 2)  # so many that hardly one comes back by chance
    _, decode = draw(sizes, steps=1500, rows=2, prompt=1, skew=0.0, stickiness=stickiness)
    stayed = (decode[1:, ..., :, None] == decode[:-1, ..., None, :]).any(-1).float().mean()
    assert float(stayed) == pytest.approx(stickiness, abs=0.02)


def test_steps_follow_the_prompt():
    prompts, decode = draw(stickiness=1.0)
    last = prompts[-1].sort(-1).values
    assert all(torch.equal(step.sort(-1).values, last) for step in decode)


def test_the_trace_has_the_same_routes_row_by_row():
    prompts, decode = draw(seed=5, stickiness=0.5)
    trace = synthetic_trace(SIZES, steps=20, rows=2, prompt=4, seed=5, stickiness=0.5)
    assert (trace.items, trace.layers, trace.top_k, trace.num_experts) == (2, 3, 3, 12)
    assert trace.meta == {"model": "synthetic", "skew": "0.6", "stickiness": "0.5", "seed": "5"}
    for row in range(2):
        tokens = trace.rows(row)
        assert trace.kind[tokens].tolist() == [PROMPT_TEXT] * 4 + [GENERATED] * 20
        wanted = torch.cat([prompts[:, :, row], decode[:, :, row]])
        assert torch.equal(trace.experts[tokens].long(), wanted)
    assert sum(1 for _ in requests(trace)) == 40


def test_a_trace_may_have_no_prompt_and_real_sizes():
    trace = synthetic_trace(RouteSizes(48, 128, 8), steps=3, rows=1, prompt=0)
    assert (trace.kind == GENERATED).all()
    assert all(len(layer) == 8 for step in requests(trace) for layer in step)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skew": -1.0}, "skew -1.0 must lie between 0 and inf"),
        ({"skew": math.nan}, "skew nan"),
        ({"stickiness": 1.5}, "stickiness 1.5 must lie between 0 and 1"),
        ({"sizes": RouteSizes(3, 2, 3)}, "top_k 3 must lie between 1 and 2"),
        ({"sizes": RouteSizes(0, 4, 2)}, "layers 0 must lie"),
        ({"rows": 0}, "rows 0 must lie"),
        ({"steps": -1}, "steps -1 must lie"),
    ],
)
def test_parameters_out_of_range_are_refused(options, said):
    with pytest.raises(ExpertFlowError, match=said):
        draw(**options)
