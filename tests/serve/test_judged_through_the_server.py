"""The shipped dense model judged twice: by the library, and over HTTP as any OpenAI-compatible server would be."""

from pathlib import Path

import pytest

from eval.comparison import compare
from eval.endpoint import Endpoint
from eval.judge import System, judge
from eval.tasks import generated_tasks
from expertflow_quant import Engine

pytest.importorskip("openai")

SHIPPED = Path(__file__).parents[2] / "calibration" / "shipped" / "dense"


def test_answers_over_http_are_those_of_the_library(serve, tmp_path):
    server, tasks = serve(Engine.from_plain(SHIPPED), "dense"), generated_tasks(5)
    ours = judge(System("library", "library", SHIPPED), tasks, tmp_path, batch_size=1)
    endpoint = Endpoint(server.url, parallel=3)
    theirs = judge(System("served", "served", Path("dense"), endpoint=endpoint), tasks, tmp_path, batch_size=4)
    assert ours.failures == theirs.failures == 0
    assert [(r.prediction, r.score, r.prompt_tokens, r.completion_tokens) for r in ours.results] == [
        (r.prediction, r.score, r.prompt_tokens, r.completion_tokens) for r in theirs.results
    ]
    assert all(c.same_predictions == 5 for c in compare(theirs, ours, 0.01))
    assert ours.mean("chart") > 0.5
