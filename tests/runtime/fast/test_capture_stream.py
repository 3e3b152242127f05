"""On which stream steps are captured, with a GPU that is made up."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from helpers.fast import load_fast


def test_all_buckets_are_captured_on_one_stream_of_the_device(folder_of, monkeypatch):
    """A pool of graphs gives memory that one of them freed only to the stream that had it."""
    graphs = load_fast(folder_of("qwen3_moe"), rows=4).runner.graphs
    device, made, captured = SimpleNamespace(type="cuda"), [], []

    def stream(of):
        made.append(SimpleNamespace(device=of, wait_stream=lambda other: None))
        return made[-1]

    def graph(graph, *, pool, stream, **options):
        captured.append((pool, stream))
        return nullcontext()

    made_up = {
        "Stream": stream,
        "stream": lambda of: nullcontext(),
        "device": lambda of: nullcontext(),
        "current_stream": lambda of: SimpleNamespace(wait_stream=lambda other: None),
        "synchronize": lambda of: None,
        "graph_pool_handle": object,
        "CUDAGraph": object,
        "graph": graph,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "device", device)
    monkeypatch.setattr(graphs, "compiled", lambda rows: nullcontext())
    monkeypatch.setattr(graphs, "_run", lambda bucket: None)
    graphs.capture()
    assert [graphs.streams(bucket) for bucket in graphs.buckets] == [False] * 3
    assert len(captured) == 3
    assert all(pair == captured[0] for pair in captured)
    assert [each.device for each in made] == [device]
