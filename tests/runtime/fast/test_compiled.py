"""Layers compiled for a capture: which topk goes to our kernel, code shared by layers, and the model afterwards."""

import operator

import pytest
import torch
from helpers import fast
from helpers.fast import CONVERSATIONS, load_fast, tokens
from torch import nn

from expertflow_quant.kernels.topk import MAX_K, MAX_ROW
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.fast import compiled

OURS = torch.ops.expertflow.small_topk.default


class Backend:
    """Runs graphs as they are after ``replace_topk``, and counts."""

    def __init__(self):
        self.graphs, self.replaced, self.left = 0, 0, 0

    def __call__(self, module, inputs):
        self.graphs += 1
        self.replaced += compiled.replace_topk(module)
        targets = [node.target for node in module.graph.nodes]
        self.left += sum(target in (torch.topk, "topk") for target in targets)
        assert self.replaced >= targets.count(OURS)
        module.graph.lint()
        return module


@pytest.fixture
def backend(monkeypatch):
    torch._dynamo.reset()
    counting = Backend()
    monkeypatch.setattr(compiled, "_backend", lambda tuned: counting)
    yield counting
    torch._dynamo.reset()


def run(function, backend, *inputs):
    """What the function gives compiled, and by itself."""
    with torch.inference_mode():
        return torch.compile(function, backend=backend, dynamic=False)(*inputs), function(*inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda scores: torch.topk(scores, 3),
        lambda scores: torch.topk(scores, k=3, dim=-1),
        lambda scores: torch.topk(scores, 3, 1, True, True),
        lambda scores: scores.topk(3),
        lambda scores: scores.topk(k=3, dim=1, sorted=True),
        lambda scores: scores.softmax(-1).topk(3, largest=True),
        lambda scores: torch.topk(torch.topk(scores, 5)[0], 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_of_short_rows_is_replaced(function, dtype, backend):
    def both(scores):
        values, indices = function(scores)
        return values + 0, indices + 0

    # without ties, whose order torch leaves open
    scores = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(4)])
    got, want = run(both, backend, (scores / 8 - 1).to(dtype))
    assert backend.replaced > 0
    assert backend.left == 0
    assert [each.dtype for each in got] == [each.dtype for each in want]
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_an_order_that_nobody_asked_for_is_no_hindrance(backend):
    scores = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    got, want = run(lambda scores: torch.topk(scores, 4, sorted=False)[1] * 1, backend, scores)
    assert backend.replaced == 1
    assert torch.equal(got.sort(dim=1)[0], want.sort(dim=1)[0])


def test_a_named_result_is_taken_apart_by_the_compiler(backend):
    got, want = run(lambda scores: torch.topk(scores, 2).indices * 1, backend, torch.randn(3, 8))
    assert torch.equal(got, want)
    assert backend.replaced == 1


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda scores: torch.topk(scores, MAX_K + 1), (2, 64)),
        (lambda scores: torch.topk(scores, 2), (2, MAX_ROW + 1)),
        (lambda scores: torch.topk(scores, 2, dim=0), (4, 8)),
        (lambda scores: scores.topk(2, 0), (4, 8)),
        (lambda scores: torch.topk(scores, 2, largest=False), (4, 8)),
        (lambda scores: torch.topk(scores, 2, -1, False), (4, 8)),
        (lambda scores: torch.topk(scores, 2), (8,)),
        (lambda scores: scores.topk(2), (2, 3, 8)),
        (lambda scores: scores.double().topk(2), (2, 8)),
        (lambda scores: (scores * 100).long().topk(2), (2, 8)),
        (lambda scores: torch.topk(input=scores, k=2), (4, 8)),
    ],
)
def test_other_topk_is_left_alone(function, shape, backend):
    def both(scores):
        values, indices = function(scores)
        return values + 0, indices + 0

    got, want = run(both, backend, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert (backend.replaced, backend.left) == (0, 1)
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_a_result_that_is_used_whole_is_left_alone():
    graph = torch.fx.Graph()
    scores = graph.placeholder("scores")
    scores.meta["example_value"] = torch.zeros(2, 8)
    found = graph.call_function(torch.topk, (scores, 2))
    graph.output((graph.call_function(getattr, (found, "indices")), graph.call_function(OURS, (scores, 2))))
    module = torch.fx.GraphModule(nn.Module(), graph)
    assert compiled.replace_topk(module) == 0
    assert torch.topk in [node.target for node in module.graph.nodes]


def test_without_known_shapes_nothing_is_replaced():
    graph = torch.fx.Graph()
    found = graph.call_function(torch.topk, (graph.placeholder("scores"), 2))
    graph.output(graph.call_function(operator.getitem, (found, 0)))
    assert compiled.replace_topk(torch.fx.GraphModule(nn.Module(), graph)) == 0


def test_ours_is_an_operation_that_the_compiler_can_trust():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(OURS, (torch.randn(3, 12).to(dtype), 4))


def step_logits(engine, layers, rows):
    """Logits of three steps of ``rows`` rows, with ``layers`` compiled."""
    graphs, found = engine.runner.graphs, []
    (prompts,) = engine._encode(CONVERSATIONS[:rows], Sampling(5))
    with torch.inference_mode():
        graphs.tokens[:rows, 0] = engine.runner.prefill(prompts, 0).argmax(dim=-1)
        graphs.active[:rows] = True
        with compiled.compiled(layers, rows):
            for _ in range(3):
                graphs.step(graphs.bucket(rows))
                found.append(graphs.logits(rows).clone())
    return torch.stack(found)


@pytest.mark.parametrize("family", [family for family in fast.TAKEN if family not in ("gpt_oss", "nemotron_h")])
def test_layers_of_one_class_share_their_code(family, folder_of, backend):
    engine = load_fast(folder_of(family), "50%", rows=2)
    layers = engine.model.get_decoder().layers
    want = step_logits(engine, [], 2)
    assert backend.graphs == 0
    torch.testing.assert_close(step_logits(engine, layers[:1], 2), want, rtol=0, atol=1e-5)
    one = backend.graphs
    assert 0 < one <= 8
    assert (backend.replaced, backend.left) == (1, 0)
    torch._dynamo.reset()
    torch.testing.assert_close(step_logits(engine, layers, 2), want, rtol=0, atol=1e-5)
    assert backend.graphs == 2 * one
    torch.testing.assert_close(step_logits(engine, layers, 1), step_logits(engine, [], 1), rtol=0, atol=1e-5)
    assert backend.graphs == 3 * one  # once more for another number of rows


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_layers_that_differ_compile_too(family, folder_of, backend):
    engine = load_fast(folder_of(family), "80%", rows=2)
    want = step_logits(engine, [], 2)
    got = step_logits(engine, engine.model.get_decoder().layers, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert backend.graphs > 0


def test_prompts_of_any_size_share_their_code(folder_of, backend):
    engine = load_fast(folder_of("qwen3_moe"), "50%", rows=4)
    layers, counts = engine.model.get_decoder().layers, []
    for first in range(4):
        (prompts,) = engine._encode(CONVERSATIONS[first : first + 2 + first % 2], Sampling(5))
        with torch.inference_mode():
            want = engine.runner.prefill(prompts, 0)
            with compiled.compiled(layers, None):
                got = engine.runner.prefill(prompts, 0)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        counts.append(backend.graphs)
    assert counts == [counts[0]] * 4


def test_the_model_is_as_it_was_afterwards(folder_of, plain_of, backend):
    engine = load_fast(folder_of("qwen3_moe"), rows=2)
    layers = engine.model.get_decoder().layers
    config = torch._dynamo.config.automatic_dynamic_shapes, torch._dynamo.config.recompile_limit
    step_logits(engine, layers, 2)
    with pytest.raises(OSError, match="broken"), compiled.compiled(layers, 2):
        raise OSError("broken")
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert (torch._dynamo.config.automatic_dynamic_shapes, torch._dynamo.config.recompile_limit) == config
    count = backend.graphs
    assert tokens(engine, CONVERSATIONS[:2]) == tokens(plain_of("qwen3_moe"), CONVERSATIONS[:2])
    assert backend.graphs == count


def test_only_single_rows_have_their_products_generated():
    assert compiled._backend(True) is compiled._backend(True)
    assert compiled._backend(True) is not compiled._backend(False)
