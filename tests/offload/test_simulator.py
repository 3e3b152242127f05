"""The simulator counts what the two caches of the runtime count, and nothing beats Belady's optimum."""

import random
from itertools import combinations, pairwise

import pytest
from helpers.resident import FORMATS, routed, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.offload.layer_policy import LAYER_POLICIES
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.policies.affinity import Affinity, fit_affinity
from expertflow_quant.offload.policies.belady import Belady, Future, most_hits
from expertflow_quant.offload.policies.by_layer import by_layer
from expertflow_quant.offload.policies.frequency import LFU, Popular, UseRates, popularity
from expertflow_quant.offload.policies.predictive import Predictive
from expertflow_quant.offload.policies.scan import ScanResistant
from expertflow_quant.offload.policy import LRU, Progress
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.offload.resolve import SlotBook
from expertflow_quant.offload.simulator import Link, replay
from expertflow_quant.offload.slots import LayerRecords, minimum_bytes
from expertflow_quant.offload.stats import LayerStats
from expertflow_quant.offload.synthetic_trace import RouteSizes, synthetic_trace
from expertflow_quant.offload.trace import requests

EXPERTS = 6
ALIKE = [["int4-g16"] * EXPERTS] * 2
MIXED = [list((FORMATS * 2)[:EXPERTS]), list((FORMATS[1:] * 3)[:EXPERTS])]
SOME = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True).map(sorted)
STEPS = st.lists(st.lists(SOME, min_size=2, max_size=2), min_size=1, max_size=20)
HOST = {
    "lru": lambda progress: LRU(),
    "lfu": lambda progress: LFU(progress, 4),
    "scan": ScanResistant,
    "popular": lambda progress: Popular([[expert / 6 for expert in range(EXPERTS)]] * 2),
    "predictive": Predictive,
}
"""One of each kind that needs nothing but the run."""

SHARES = [[0.1, 0.5, 0.1, 0.9, 0.0, 0.5]] * 2
"""Of the steps of a recorded run; some are equal."""

FOUR = {name: HOST[name] for name in ("lru", "lfu", "scan", "predictive")}


def flat(layers, experts, top_k, slots):
    """A model of one-byte records, and a budget of so many slots."""
    return [LayerRecords((1,) * experts, top_k)] * layers, slots


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([ALIKE, MIXED]), st.floats(0, 1), STEPS, st.sampled_from(sorted(HOST)), st.booleans())
def test_hits_and_bytes_are_those_of_the_hosts_cache(formats, share, steps, name, preload):
    store = store_of(formats)
    least = minimum_bytes(store.layers)
    budget = least + int((store.nbytes - least) * share)
    progress = Progress([EXPERTS] * 2)
    cache = ExpertCache(store, budget, policy=lambda: HOST[name](progress))
    if preload:
        cache.preload()
    for step in steps:
        progress.begin_step()
        for layer, wanted in enumerate(step):
            progress.begin_layer(layer, wanted)
            for piece in cache.pieces(layer, wanted):
                in_use = {(layer, expert) for expert in piece}
                for expert in piece:
                    cache.acquire(layer, expert, in_use)
    found = replay(steps, store.layers, budget, HOST[name], preload=preload)
    assert found.layers == cache.stats.layers
    assert found.bytes_moved == cache.stats.bytes_moved


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([ALIKE, MIXED]),
    st.floats(0, 1),
    STEPS,
    st.sampled_from(sorted(LAYER_POLICIES)),
    st.booleans(),
    st.sets(st.integers(0, 19)),
)
def test_hits_and_bytes_are_those_of_the_devices_cache(formats, share, steps, name, preload, prefills):
    store = store_of(formats)
    budget = max(1, int(store.nbytes * share))
    shares = None if name == "lfu" else SHARES
    resident = ResidentExperts(store, plan_layer_slots(store.layers, budget), "cpu", name, shares)
    if preload:
        resident.preload()
    streamed = [index in prefills for index in range(len(steps))]
    hits, misses = [0, 0], [0, 0]
    for step, is_prefill in zip(steps, streamed, strict=True):
        if not is_prefill:
            resident.begin_step()
        for layer, wanted in enumerate(step):
            if is_prefill:  # streamed.py: residents from their slots, the others past them
                there = len(set(wanted) & set(resident.resident_experts()[layer]))
                hits[layer] += there
                misses[layer] += len(wanted) - there
            else:
                resident.resolve(layer, routed(wanted))
    host = by_layer(name, shares)
    found = replay(steps, store.layers, budget, host, None, streamed, slots="layers", preload=preload)
    for layer, stats in enumerate(resident.stats.layers):
        assert found.layers[layer] == LayerStats(stats.hits + hits[layer], stats.misses + misses[layer])
    if not prefills:
        assert found.bytes_moved == resident.stats.bytes_moved


@given(st.integers(1, 5), st.lists(SOME, min_size=1, max_size=30))
def test_hits_of_one_layer_are_those_of_the_slot_book(slots, steps):
    book = SlotBook([-1] * slots, [-1] * slots, [0] * slots, [0] * EXPERTS)
    hits = sum(len(book.resolve(wanted, step).hits) for step, wanted in enumerate(steps, 1))
    layers, budget = flat(1, EXPERTS, 1, slots)
    assert replay([[step] for step in steps], layers, budget, HOST["lru"], slots="layers").hits == hits


def best_by_force(requests, slots, bypass):
    """The most hits that any choice reaches: every set of residents after each request is tried. ``bypass``: any
    part of what was resident or wanted may stay; else all that was wanted must."""
    best = {frozenset(): 0}
    for wanted in map(frozenset, requests):
        reached = {}
        for held, hits in best.items():
            now = hits + len(held & wanted)
            pool = held | wanted if bypass else held - wanted
            room = slots if bypass else slots - len(wanted)
            for kept in combinations(sorted(pool), min(room, len(pool))):
                after = frozenset(kept) if bypass else frozenset(kept) | wanted
                reached[after] = max(reached.get(after, 0), now)
        best = reached
    return max(best.values())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 5),
    st.lists(st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=2), min_size=2, max_size=2), max_size=9),
)
def test_nothing_beats_belady_where_every_missing_expert_takes_a_slot(slots, steps):
    layers, budget = flat(2, 4, 2, slots)
    future = Future(steps)
    found = replay(steps, layers, budget, lambda progress: Belady(progress, future)).hits
    requests = [{(layer, expert) for expert in wanted} for step in steps for layer, wanted in enumerate(step)]
    assert found == best_by_force(requests, slots, bypass=False)
    assert all(replay(steps, layers, budget, make).hits <= found for make in FOUR.values())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4), st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=8))
def test_nothing_beats_the_bound_where_a_missing_expert_can_do_without_a_slot(slots, steps):
    requests = [[step] for step in steps]
    bound = most_hits(requests, 0, range(5), slots)
    assert bound == best_by_force(steps, slots, bypass=True)
    if slots:
        layers, budget = flat(1, 5, 1, slots)
        future = Future(requests)
        policies = [lambda progress: LRU(), ScanResistant, LFU, Predictive, lambda now: Belady(now, future)]
        assert all(replay(requests, layers, budget, make, slots="layers").hits <= bound for make in policies)


def test_a_scan_of_all_layers_leaves_what_was_in_use_where_lru_forgets_it():
    layers, budget = flat(3, 4, 1, 7)
    decode, prompt = [[0], [1], [2]], [[0, 1, 2, 3]] * 3
    steps = [decode, decode, prompt, decode]
    lru = replay(steps, layers, budget, HOST["lru"])
    scan = replay(steps, layers, budget, ScanResistant)
    assert [layer.hits for layer in lru.layers] == [2, 2, 2]  # layer 0 is lost when the prompt has passed
    assert [layer.hits for layer in scan.layers] == [3, 3, 3]


def test_batches_that_want_everything_hit_a_fixed_part_where_lru_hits_nothing():
    layers, budget = flat(4, 4, 1, 8)
    steps = [[[0, 1, 2, 3]] * 4] * 10
    assert replay(steps, layers, budget, HOST["lru"]).hits == 0
    assert replay(steps, layers, budget, ScanResistant).hits >= 9 * 4
    assert replay(steps, layers, budget, Predictive).hits >= 9 * 4


def test_popularity_is_the_share_of_steps_and_keeps_the_popular():
    steps = [[[0, 1]], [[0]], [[0, 2]], [[3]]]
    shares = popularity(steps, [4])
    assert shares == [[0.75, 0.25, 0.25, 0.25]]
    layers, budget = flat(1, 4, 1, 1)
    found = replay(steps, layers, budget, lambda progress: Popular(shares), slots="layers")
    assert found.hits == 2  # expert 0 in the second and third step; it never leaves


def test_frequency_forgets():
    layers, budget = flat(1, 3, 1, 1)
    steps = [[[0]]] * 5 + [[[1]]] * 3
    quick = replay(steps, layers, budget, lambda progress: LFU(progress, 0.5), slots="layers")
    slow = replay(steps, layers, budget, lambda progress: LFU(progress, 1000), slots="layers")
    assert quick.hits == 4 + 2
    assert slow.hits == 4


def test_a_right_prediction_keeps_what_is_to_come_and_a_wrong_one_costs_hits():
    layers, budget = flat(2, 4, 1, 2)
    steps = [[[0], [2]], [[0], [2]], [[1], [0]], [[0], [0]]]
    right = [[[float(e in wanted) for e in range(4)] for wanted in step] for step in steps]
    wrong = [[[float(e not in wanted) for e in range(4)] for wanted in step] for step in steps]
    assert replay(steps, layers, budget, Predictive, right).hits == 4
    assert replay(steps, layers, budget, HOST["lru"]).hits == 3
    assert replay(steps, layers, budget, Predictive, wrong).hits == 2


def test_affinity_learns_what_follows_what():
    """Experts 0 and 1 alternate, and so do 2 and 3, in runs: the present one tells the next, counts do not."""
    run = [[[0]], [[1]]] * 3
    other = [[[2]], [[3]]] * 3
    steps = (run + other) * 20
    table = fit_affinity(steps, [4], forget=0.0, ridge=0.1)
    progress = Progress([4])
    affinity = Affinity(progress, table)
    progress.begin_step()
    progress.begin_layer(0, [0])
    assert affinity.rate((0, 1)) > 0.9
    assert max(affinity.rate((0, expert)) for expert in (0, 2, 3)) < 0.2
    progress.begin_step()
    progress.begin_layer(0, [3])
    assert affinity.rate((0, 2)) > affinity.rate((0, 0)) > affinity.rate((0, 1))


def test_affinity_of_a_layer_sees_this_step_below_it_and_the_last_one_above():
    generator = random.Random(0)
    draws = [generator.randrange(2) for _ in range(200)]
    steps = [[[now], [before]] for before, now in pairwise(draws)]  # layer 1 does what layer 0 did a step ago
    table = fit_affinity(steps, [2, 2], forget=0.0, ridge=0.1)
    progress = Progress([2, 2])
    affinity = Affinity(progress, table)
    progress.begin_step()
    progress.begin_layer(0, [1])
    progress.begin_layer(1, [0])
    assert affinity.rate((1, 1)) > 0.9 > 0.1 > affinity.rate((1, 0))


def test_ahead_moves_what_fits_beside_the_computation_and_pays_in_time():
    layers = [LayerRecords((100,) * 4, 1)] * 3
    steps = [[[0], [1], [2]], [[3], [2], [1]]]
    oracle = [[[float(e in wanted) for e in range(4)] for wanted in step] for step in steps]
    link = Link(bytes_per_second=1000.0, layer_seconds=0.1)
    off = replay(steps, layers, 300, Predictive, oracle, link=link)
    on = replay(steps, layers, 300, Predictive, oracle, link=link, ahead=True)
    assert (off.hits, off.bytes_moved, off.fetched_ahead_bytes) == (0, 600, 0)
    assert off.seconds == pytest.approx(6 * 0.1 + 6 * 0.1)
    assert (on.hits, on.misses, on.fetched_ahead_bytes) == (4, 2, 400)
    assert on.seconds == pytest.approx(6 * 0.1 + 2 * 0.1)
    half = replay(steps, layers, 300, Predictive, oracle, link=Link(500.0, 0.1), ahead=True)
    assert half.fetched_ahead_bytes == 200


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["shared", "layers"]), st.integers(1, 10), STEPS, st.integers(0, 3))
def test_ahead_of_a_sure_prediction_no_bytes_are_wasted_twice_and_requests_stay_the_same(slots, budget, steps, rate):
    layers, _ = flat(2, EXPERTS, 1, budget)
    oracle = [[[float(e in wanted) for e in range(EXPERTS)] for wanted in step] for step in steps]
    link = Link(rate + 0.5, 1.0)
    found = replay(steps, layers, budget, Predictive, oracle, slots=slots, link=link, ahead=True)
    assert found.hits + found.misses == sum(len(wanted) for step in steps for wanted in step)
    assert found.fetched_ahead_bytes <= found.steps * 2 * (rate + 0.5)
    assert found.fetched_ahead_bytes <= sum(layer.hits for layer in found.layers[1:])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: replay([[[0]]], flat(2, 4, 1, 4)[0], 4, HOST["lru"]), "1 layers, the model has 2"),
        (lambda: replay([], flat(1, 4, 1, 4)[0], 4, HOST["lru"], ahead=True), "needs predictions"),
        (lambda: Link(0, 1), "more than 0 bytes"),
        (lambda: LFU(Progress([4]), 0), "half life of 0"),
        (lambda: Predictive(Progress([4]), discount=1.0), "discount 1.0"),
        (lambda: UseRates(Progress([4]), prior=[[0.5] * 3]), "popularity of this model"),
        (lambda: fit_affinity([[[0]]], [4]), "1 steps"),
        (lambda: Affinity(Progress([5]), fit_affinity([[[0]], [[1]]], [4])), "table of 4 experts, the model has 5"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(ExpertFlowError, match=said):
        call()


def test_with_many_residents_the_predictive_policy_keeps_up_with_lru_on_sticky_routes():
    """A quarter of 512 experts, four in ten of a token's experts are those of the token before."""
    trace = synthetic_trace(RouteSizes(8, 64, 6), steps=120, rows=1, prompt=10, stickiness=0.45)
    steps, (layers, slots) = list(requests(trace, "all")), flat(8, 64, 6, 128)
    predictive, lru = (
        replay(steps, layers, slots, HOST[name], preload=True).hit_rate for name in ("predictive", "lru")
    )
    assert predictive > lru


@settings(max_examples=30, deadline=None)
@given(STEPS, st.integers(6, 12), st.integers(1, 12))
def test_few_candidates_are_those_unused_for_longest(steps, slots, few):
    """A brute force over the residents in order of their last use, with ranks as they are at each miss."""

    class Few(Predictive):
        candidates = few

        def victim(self, in_use):
            chosen = super().victim(in_use)
            oldest = [key for key in self._order if key not in in_use][:few]
            assert chosen == (min(oldest, key=self.rank) if oldest else None)
            return chosen

    layers, budget = flat(2, EXPERTS, 6, slots)
    replay(steps, layers, budget, Few)
