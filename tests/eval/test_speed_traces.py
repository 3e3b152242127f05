"""Routes: what skew and stickiness mean, the statistics against slow counts, files that are read or refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.speed.trace_stats import (
    distinct_per_step,
    effective_experts,
    lru_hit_rate,
    repeat_rate,
    slots_per_layer,
    statistics,
)
from eval.speed.traces import RouteSizes, calibrate, load_trace, save_trace, synthetic
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.policy import LRU
from expertflow_quant.offload.slots import SlotTable

SIZES = RouteSizes(layers=3, experts=16, top_k=4)


def draw(**options):
    return synthetic(SIZES, **{"steps": 40, "rows": 2, "prompt": 5, **options})


def slow_hit_rate(routes, slots, skip):
    """The same cache as the library's tables make it, expert by expert."""
    hits = requests = 0
    for layer in range(routes.shape[1]):
        table = SlotTable(slots, LRU())
        for step in range(routes.shape[0]):
            wanted = sorted({int(expert) for expert in routes[step, layer].ravel()})
            in_use = {(layer, expert) for expert in wanted}
            found = [table.place((layer, expert), in_use)[1] for expert in wanted]
            if step >= skip:
                hits += sum(found)
                requests += len(found)
    return hits / requests


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 2),
    slots=st.integers(8, 15),
    skip=st.integers(0, 5),
    stickiness=st.floats(0, 1),
)
def test_hit_rate_is_that_of_the_library_s_least_recently_used_table(seed, rows, slots, skip, stickiness):
    routes = draw(steps=12, rows=rows, prompt=0, seed=seed, stickiness=stickiness).decode
    assert lru_hit_rate(routes, SIZES.experts, slots, skip) == pytest.approx(slow_hit_rate(routes, slots, skip))


def test_a_cache_of_everything_always_hits_and_a_larger_one_hits_more():
    routes = draw(stickiness=0.3).decode
    rates = [lru_hit_rate(routes, 16, slots) for slots in (8, 12, 15, 16)]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0 > rates[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), skew=st.floats(0, 3), stickiness=st.floats(0, 1))
def test_a_token_never_has_an_expert_twice_and_seeds_repeat(seed, skew, stickiness):
    trace = draw(steps=6, skew=skew, stickiness=stickiness, seed=seed)
    assert trace.decode.shape == (6, 3, 2, 4)
    assert trace.prefill.shape == (5, 3, 2, 4)
    for routes in (trace.decode, trace.prefill):
        assert routes.dtype == np.int32
        assert 0 <= routes.min() <= routes.max() < 16
        assert (np.diff(np.sort(routes, axis=-1), axis=-1) > 0).all()
    assert (draw(steps=6, skew=skew, stickiness=stickiness, seed=seed).decode == trace.decode).all()


def test_stickiness_one_repeats_the_prompt_s_last_experts_for_ever():
    trace = draw(stickiness=1.0)
    assert repeat_rate(trace.decode) == 1.0
    assert distinct_per_step(trace.decode[:, :, :1], 16) == 4
    assert (np.sort(trace.decode, axis=-1) == np.sort(trace.prefill[-1:], axis=-1)).all()


def test_without_skew_and_stickiness_experts_are_even_and_independent():
    trace = draw(steps=800, skew=0.0, stickiness=0.0, prompt=1)
    assert effective_experts(trace.decode, 16) == pytest.approx(16, rel=0.01)
    assert repeat_rate(trace.decode) == pytest.approx(4 / 16, abs=0.02)
    expected = 16 * (1 - (1 - 4 / 16) ** 2)  # of two independent tokens
    assert distinct_per_step(trace.decode, 16) == pytest.approx(expected, rel=0.02)


def test_skew_makes_few_experts_do_most_of_the_work():
    spread = [effective_experts(draw(steps=300, skew=skew).decode, 16) for skew in (0.0, 1.0, 3.0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 8


def test_effective_experts_of_a_known_distribution():
    routes = np.array([0, 0, 0, 1], dtype=np.int32).reshape(4, 1, 1, 1)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_experts(routes, 5) == pytest.approx(math.exp(entropy))


def test_repeat_rate_compares_a_row_with_itself_only():
    routes = np.array([[[[0, 1], [2, 3]]], [[[1, 2], [2, 3]]]], dtype=np.int32)
    assert repeat_rate(routes) == pytest.approx(3 / 4)
    assert repeat_rate(routes[:1]) == 0.0


@pytest.mark.parametrize("sizes", [RouteSizes(4, 128, 8), RouteSizes(4, 64, 8), RouteSizes(4, 32, 4)])
def test_calibration_meets_its_hit_rate(sizes):
    found = calibrate(sizes, resident=0.25, target_hits=0.7)
    routes = synthetic(sizes, steps=200, rows=1, prompt=1, stickiness=found, seed=7).decode
    assert lru_hit_rate(routes, sizes.experts, slots_per_layer(sizes.experts, sizes.top_k, 0.25)) == pytest.approx(
        0.7, abs=0.04
    )


def test_calibration_stops_where_no_stickiness_would_do():
    assert calibrate(SIZES, resident=0.9, target_hits=0.1) == 0.0
    assert calibrate(SIZES, resident=1.0, target_hits=1.0) == 0.0


def test_slots_hold_at_least_a_token_and_at_most_everything():
    assert [slots_per_layer(128, 8, share) for share in (0.01, 0.25, 1.0)] == [8, 32, 128]


def test_statistics_have_every_batch_size_up_to_the_rows():
    trace = draw(rows=3)
    found = statistics(trace.decode, trace.prefill, 16, [0.25, 0.5, 0.5])
    assert list(found["distinct_by_rows"]) == list(found["lru_hit_rate"]) == ["1", "2", "3"]
    assert list(found["lru_hit_rate"]["1"]) == ["0.25", "0.5"]
    assert found["distinct_by_rows"]["1"] == 4
    assert 4 < found["distinct_in_prefill"] <= 16


def test_parts_keep_rows_and_the_prompt_s_end_and_prompts_follow_each_other():
    trace = draw(rows=3, prompt=6)
    part = trace.part(2, 4)
    assert part.decode.shape == (40, 3, 2, 4)
    flat = part.prompt_routes()
    assert flat.shape == (3, 2 * 4, 4)
    for row in range(2):
        for token in range(4):
            assert (flat[:, row * 4 + token] == trace.prefill[2 + token, :, row]).all()


def test_a_file_gives_back_what_was_saved(tmp_path):
    trace = draw(stickiness=0.5)
    save_trace(tmp_path / "routes.npz", trace)
    smaller = RouteSizes(2, 16, 4)
    found = load_trace(tmp_path / "routes.npz", smaller, steps=30, rows=1, prompt=3)
    assert (found.decode == trace.decode[:30, :2, :1]).all()
    assert (found.prefill == trace.prefill[:3, :2, :1]).all()
    assert found.origin == {"kind": "recorded", "file": "routes.npz", "repeated_prompt": False}


def test_a_file_without_prompts_repeats_its_steps(tmp_path):
    decode = draw(steps=3).decode
    np.savez(tmp_path / "routes.npz", decode=decode, experts=np.int32(16))
    found = load_trace(tmp_path / "routes.npz", SIZES, steps=3, rows=2, prompt=7)
    assert (found.prefill == decode[[0, 1, 2, 0, 1, 2, 0]]).all()
    assert found.origin["repeated_prompt"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"experts": np.int32(16)}, "is no trace"),
        ({"decode": np.zeros((4, 3, 2), np.int32), "experts": np.int32(16)}, "four-dimensional"),
        ({"decode": np.full((40, 3, 2, 4), 0.5), "experts": np.int32(16)}, "four-dimensional integers"),
        ({"decode": np.zeros((40, 3, 2, 4), np.int32), "experts": np.int32(16)}, "twice"),
        ({"decode": np.arange(4, dtype=np.int32) + np.full((40, 3, 2, 1), 14), "experts": np.int32(16)}, "outside"),
        ({"decode": np.arange(4, dtype=np.int32) + np.zeros((40, 2, 2, 1), int), "experts": np.int32(16)}, "2 layers"),
        ({"decode": np.arange(4, dtype=np.int32) + np.zeros((9, 3, 2, 1), int), "experts": np.int32(16)}, "9 steps"),
        ({"decode": np.array([{}], dtype=object), "experts": np.int32(16)}, "is no trace"),
    ],
)
def test_files_that_are_no_trace_or_do_not_fit_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "routes.npz", **arrays)
    with pytest.raises(ExpertFlowError, match=said):
        load_trace(tmp_path / "routes.npz", SIZES, steps=10, rows=2, prompt=4)


def test_a_file_that_is_not_there_or_no_archive_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("routes")
    for name in ("absent.npz", "text.npz"):
        with pytest.raises(ExpertFlowError, match="is no trace"):
            load_trace(tmp_path / name, SIZES, steps=1, rows=1, prompt=1)


@pytest.mark.parametrize("odd", [{"skew": -1.0}, {"stickiness": 1.5}, {"stickiness": math.nan}])
def test_parameters_out_of_range_are_refused(odd):
    with pytest.raises(ExpertFlowError, match="must lie between"):
        draw(**odd)
