"""Who is answered together: nobody waits longer than was promised, and only those that can be go together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow_quant.runtime.schedule import Admission
from expertflow_quant.serve.line import Line
from expertflow_quant.serve.work import Job, Sampling


def job(path=None, **drawn):
    return Job([], Sampling(4, **drawn), lambda event: None, path=path)


def path(bits):
    return torch.tensor([[bool(bits >> place & 1) for place in range(6)]])


ARRIVALS = st.lists(
    st.one_of(
        st.integers(0, 63).map(lambda bits: ("come", bits)),
        st.just(("answer", 0)),
        st.integers(0, 30).map(lambda place: ("leave", place)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(ARRIVALS, st.integers(1, 4), st.integers(0, 3))
def test_nobody_is_passed_over_for_more_batches_than_promised(events, rows, patience):
    """However requests come, leave and are answered: everybody is answered once, at most ``patience`` batches after a
    queue in order of arrival would have taken them; the oldest is in every batch."""
    line, waiting, late, plain = Line(rows, patience), [], {}, []
    for what, value in [*events, *[("answer", 0)] * 60]:
        if what == "come":
            one = job(path(value))
            line.add(one)
            waiting.append(one)
            plain.append(one)
        elif what == "leave" and waiting:
            one = waiting.pop(value % len(waiting))
            assert line.remove(one)
            assert not line.remove(one)
            plain = [each for each in plain if each is not one]
            late.pop(id(one), None)
        elif what == "answer":
            chosen = line.next()
            assert len(chosen) == min(rows, len(waiting))
            if waiting:
                assert chosen[0] is waiting[0]
            for one in chosen:
                waiting.remove(one)
                assert late.pop(id(one), 0) <= patience
            # whom order of arrival would have sent by now, and who still waits, is one batch later than that
            plain = plain[rows:]
            there = {id(one) for one in plain}
            for one in waiting:
                if id(one) not in there:
                    late[id(one)] = late.get(id(one), 0) + 1
    assert not waiting
    assert len(line) == 0


def test_like_paths_go_together():
    line = Line(2, patience=2)
    jobs = [job(path(bits)) for bits in (0b111000, 0b000111, 0b111000, 0b000111)]
    for one in jobs:
        line.add(one)
    assert line.next() == [jobs[0], jobs[2]]
    assert line.next() == [jobs[1], jobs[3]]


@pytest.mark.parametrize("patience", [0, 4])
def test_without_paths_it_is_order_of_arrival(patience):
    line, jobs = Line(3, patience), [job() for _ in range(7)]
    for one in jobs:
        line.add(one)
    assert [line.next() for _ in range(4)] == [jobs[:3], jobs[3:6], jobs[6:], []]


def test_only_answers_that_are_drawn_alike_go_together():
    line = Line(8)
    jobs = [
        job(),
        job(temperature=0.5, seed=3),
        job(temperature=0.5),
        job(seed=3),
        job(temperature=0.5, seed=3),
        job(stop=("x",)),
        job(temperature=0.5),
    ]
    for one in jobs:
        line.add(one)
    found = [line.next() for _ in range(5)]
    assert found == [[jobs[0], jobs[3]], [jobs[1]], [jobs[2], jobs[6]], [jobs[4]], [jobs[5]]]
    assert line.next() == []


def test_all_who_wait_leave_together():
    line, jobs = Line(2), [job(), job(temperature=1.0, seed=1), job()]
    for one in jobs:
        line.add(one)
    assert line.clear() == jobs
    assert line.next() == []


def test_a_request_that_left_does_not_make_others_late():
    queue = Admission(1, patience=1)
    for key in range(4):
        queue.add(key, path(63 * (key % 2)))
    queue.remove(0)
    queue.remove(2)
    assert [queue.next_batch(), queue.next_batch()] == [[1], [3]]
