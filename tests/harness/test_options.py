"""Settings of a harness become ours, and requests fall into batches that one setting covers."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow_quant import ExpertFlowError
from expertflow_quant.harness.options import NEW_TOKENS, Options, batches

STOCK = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
"""Of the stock task chartqa."""


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (STOCK, Options(16, 0.0, 1.0)),
        ({**STOCK, "until": ["\n\n", "\n", "END"]}, Options(16, 0.0, 1.0, ("\n", "END"))),
        ({}, Options(NEW_TOKENS)),
        ({"until": None, "top_p": None, "max_new_tokens": None, "num_beams": 1}, Options(NEW_TOKENS)),
        ({"until": "END"}, Options(stop=("END",))),
        ({"until": ["", "a", "b"]}, Options(stop=("a", "b"))),
        ({"temperature": 0.7, "top_p": 0.9}, Options(temperature=0.7, top_p=0.9)),
        ({"temperature": 0.7, "do_sample": False}, Options(temperature=0.0)),
        ({"do_sample": True}, Options(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.2}, Options(temperature=0.2)),
        ({"top_p": 0}, Options(top_p=0.0)),
    ],
)
def test_settings(settings, wanted):
    before = dict(settings)
    assert Options.of(settings) == wanted
    assert settings == before


def test_beams_are_refused_by_name():
    with pytest.raises(ExpertFlowError, match=r"num_beams 4.*num_beams=1"):
        Options.of({"num_beams": 4})


def test_what_is_left_out_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            Options.of({**STOCK, "image_aspect_ratio": "pad for this test"})
    assert [record.getMessage() for record in caplog.records] == [
        "generation setting image_aspect_ratio='pad for this test' has no meaning here and is left out"
    ]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from((16, 32)))), st.integers(1, 5))
def test_batches_are_runs_of_one_task_and_setting(kinds, size):
    requests = [SimpleNamespace(task_name=task, number=number) for number, (task, _) in enumerate(kinds)]
    found = list(batches(requests, [{"max_new_tokens": limit} for _, limit in kinds], size))
    assert [request for batch in found for request in batch.requests] == requests
    for batch in found:
        assert batch.requests[0].number == batch.first
        covered = {kinds[request.number] for request in batch.requests}
        assert covered == {(batch.requests[0].task_name, batch.options.max_new_tokens)}
        assert len(batch.requests) <= size
    for batch, after in pairwise(found):  # a batch ends only where it must
        assert len(batch.requests) == size or kinds[batch.requests[-1].number] != kinds[after.first]
