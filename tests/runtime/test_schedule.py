"""Groups of requests with similar paths: sizes and quality, and nobody waits longer than promised."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.runtime.schedule import (
    Admission,
    admission_order,
    balanced_groups,
    path_similarity,
    prompt_path,
)


def drawn_paths(count, seed, layers=2, experts=8):
    return torch.rand(count, layers, experts, generator=torch.Generator().manual_seed(seed)) < 0.4


def kinds(count, seed, number=4, experts=16):
    """Requests of ``number`` kinds, each with its own quarter of the experts, in random order."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.arange(count)[torch.randperm(count, generator=draw)] % number
    paths = torch.zeros(count, 2, experts, dtype=torch.bool)
    width = experts // number
    for request, of in enumerate(kind.tolist()):
        paths[request, :, of * width : (of + 1) * width] = torch.rand(2, width, generator=draw) < 0.8
    return paths, kind


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(0, 99))
def test_similarity_is_one_less_the_share_of_places_that_differ(count, seed):
    paths = drawn_paths(count, seed)
    found = path_similarity(paths)
    for i, j in itertools.product(range(count), repeat=2):
        assert float(found[i, j]) == pytest.approx(1 - int((paths[i] ^ paths[j]).sum()) / 16)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_groups_have_their_sizes_and_everyone_once(sizes, seed):
    groups = balanced_groups(path_similarity(drawn_paths(sum(sizes), seed)), sizes, seed=seed)
    assert [len(group) for group in groups] == sizes
    assert sorted(itertools.chain(*groups)) == list(range(sum(sizes)))


@pytest.mark.parametrize("seed", range(5))
def test_kinds_that_differ_are_told_apart(seed):
    paths, kind = kinds(32, seed)
    groups = balanced_groups(path_similarity(paths), [8] * 4, seed=seed)
    assert all(len(set(kind[group].tolist())) == 1 for group in groups)


@pytest.mark.parametrize("seed", range(8))
def test_two_groups_come_near_the_best_of_all(seed):
    similarity = path_similarity(drawn_paths(10, seed))

    def worth(groups):
        return sum(float(similarity[group][:, group].sum(1).max()) for group in groups)

    ways = [(list(a), [i for i in range(10) if i not in a]) for a in itertools.combinations(range(10), 5)]
    best, mean = max(map(worth, ways)), sum(map(worth, ways)) / len(ways)
    assert worth(balanced_groups(similarity, [5, 5], seed=seed)) >= mean + 0.6 * (best - mean)


class Queue:
    """What arrives when, and what was admitted, beside the order of arrival."""

    def __init__(self, rows, patience):
        self.admission, self.rows, self.batches, self.paths = Admission(rows, patience), rows, [], []

    def arrive(self, path):
        self.admission.add(len(self.paths), path)
        self.paths.append(path)

    def admit(self):
        waiting = len(self.paths) - sum(map(len, self.batches))
        batch = self.admission.next_batch()
        assert len(batch) == min(self.rows, waiting)
        self.batches.append(batch)

    def lateness(self):
        """Of everyone admitted: batches later than when batches of these sizes take from the front."""
        turns = [turn for turn, batch in enumerate(self.batches) for _ in batch]
        return [at - turns[key] for at, batch in enumerate(self.batches) for key in batch]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=15), st.integers(0, 99))
def test_nobody_is_later_than_promised(rows, patience, arrivals, seed):
    queue = Queue(rows, patience)
    draw = torch.Generator().manual_seed(seed)
    for count in [*arrivals, *[0] * sum(arrivals)]:
        for _ in range(count):
            # rare paths beside many alike: without the promise they would wait for ever
            rare = bool(torch.rand(1, generator=draw) < 0.2)
            queue.arrive(torch.rand(2, 6, generator=draw) < (0.9 if rare else 0.1))
        if len(queue.admission):
            queue.admit()
    assert sorted(itertools.chain(*queue.batches)) == list(range(len(queue.paths)))
    assert max(queue.lateness(), default=0) <= patience


def test_without_patience_requests_are_admitted_as_they_came():
    assert admission_order(drawn_paths(10, 0), 4, patience=0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_scheduled_batches_touch_fewer_experts():
    paths, _ = kinds(64, 3)

    def touched(batches):
        return sum(int(paths[batch].any(0).sum()) for batch in batches)

    assert touched(admission_order(paths, 8, patience=4)) < 0.6 * touched(admission_order(paths, 8, patience=0))


def test_a_prompts_path_is_what_its_last_tokens_used():
    experts = torch.tensor([[[0, 1]], [[2, 3]], [[2, 4]], [[2, 3]]])
    assert prompt_path(experts, 6, last=2, width=2).nonzero()[:, 1].tolist() == [2, 3]
    assert prompt_path(experts, 6, last=4, width=1).nonzero()[:, 1].tolist() == [2]
    assert prompt_path(experts, 6).nonzero()[:, 1].tolist() == [2, 3]
    assert prompt_path(experts, 6, width=9).all()


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ExpertFlowError, match="together hold all 4"):
        balanced_groups(torch.eye(4), [3, 2])
    with pytest.raises(ExpertFlowError, match="must be bool"):
        path_similarity(torch.zeros(2, 3))
    with pytest.raises(ExpertFlowError, match="rows 0 must be at least 1"):
        Admission(0)
    with pytest.raises(ExpertFlowError, match="must be \\[tokens, layers, top_k\\]"):
        prompt_path(torch.zeros(0, 2, 2), 4)
