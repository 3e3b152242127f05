"""lmms-eval in a process of its own: ``python -m eval.harness.worker ASKED ANSWERED``, two JSON files.

lmms-eval patches locks, seeds and loggers of the process it is imported into, and the libraries under it read once,
when they are imported, whether they may use the network.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the tasks of ``asked`` (``model``: arguments of ours, ``tasks``: overrides, ``limit``: items of each).

    Returns the harness's version, by task its ``scores`` by metric and its ``samples`` by document in order.
    """
    from lmms_eval.evaluator import simple_evaluate

    from expertflow_quant.harness.lmms import ExpertFlow

    model = ExpertFlow(**asked["model"])
    found = simple_evaluate(
        model=model, tasks=asked["tasks"], limit=asked["limit"], batch_size=model.batch_size, bootstrap_iters=0
    )
    return {
        "version": importlib.metadata.version("lmms-eval"),
        "tasks": {
            name: {"scores": scores(found["results"][name]), "samples": [sample(model, name, row) for row in rows]}
            for name, rows in found["samples"].items()
        },
    }


def scores(results: dict[str, Any]) -> dict[str, float]:
    """The means of a task by metric; the harness writes "METRIC,FILTER", and its errors likewise."""
    named = {name.split(",")[0]: value for name, value in results.items() if name.endswith(",none")}
    return {name: float(value) for name, value in named.items() if "_stderr" not in name}


def sample(model: Any, task: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the harness logged of one document, as far as it is compared: the text it scored, and its scores."""
    counts = row["token_counts"][0] or {}
    return {
        "document": row["doc_id"],
        "prompt": row["arguments"][0],
        "prediction": row["filtered_resps"][0],
        "scores": {name: row[name] for name in model_scores(row)},
        "prompt_tokens": counts.get("input_tokens", 0),
        "completion_tokens": counts.get("output_tokens", 0),
        "error": model.failures.get((task, row["doc_id"])),
    }


def model_scores(row: dict[str, Any]) -> list[str]:
    """The metrics in a logged row: its numbers that are not the document's own."""
    return [name for name, value in row.items() if isinstance(value, float | int) and name != "doc_id"]


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answered(settings)), encoding="utf-8")
