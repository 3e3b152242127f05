"""Traces: what they hold, their files, what a cache sees of them, and every way in which they are refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.trace import (
    GENERATED,
    PROMPT_IMAGE,
    PROMPT_TEXT,
    RoutingTrace,
    batched_requests,
    grouped_requests,
    requests,
)

TENSORS = ("token_ids", "kind", "item", "position", "experts", "weights")


def make(shapes=((3, 2), (1, 0), (2, 4)), layers=3, experts=8, top_k=2, seed=0, weights=True):
    """A trace of items with (prompt, generated) tokens and random routes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [kind for prompt, answer in shapes for kind in [n % 2 for n in range(prompt)] + [GENERATED] * answer]
    item = [number for number, (prompt, answer) in enumerate(shapes) for _ in range(prompt + answer)]
    shape = (len(kinds), layers, experts)
    routes = (
        torch.rand(shape, generator=generator).topk(top_k).indices if kinds else torch.zeros(0, layers, top_k).long()
    )
    gates = torch.rand(*routes.shape, generator=generator) if weights else None
    tasks = ["charts" if number % 2 else "documents" for number in range(len(shapes))]
    ids = torch.arange(len(kinds)) + 100
    return RoutingTrace.of(ids, kinds, item, routes, experts, tasks, weights=gates, meta={"model": "drawn"})


def assert_same(one, other):
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (one.num_experts, one.tasks, one.meta) == (other.num_experts, other.tasks, other.meta)


shapes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    layers=st.integers(1, 4),
    experts=st.sampled_from([4, 256, 257, 300]),
    top_k=st.integers(1, 4),
    weights=st.booleans(),
    generated=st.booleans(),
)
def test_a_file_gives_back_what_was_saved(tmp_path_factory, shapes, layers, experts, top_k, weights, generated):
    trace = make(shapes, layers, experts, top_k, weights=weights)
    trace = trace.generated() if generated else trace
    path = tmp_path_factory.mktemp("trace") / "folder" / "routes.safetensors"
    trace.save(path)
    assert_same(RoutingTrace.load(path), trace)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_is_compact(tmp_path):
    trace = make([(200, 0)] * 4, layers=6, experts=16)
    trace.save(tmp_path / "routes.safetensors")
    assert (tmp_path / "routes.safetensors").stat().st_size < 1200 + 800 * (4 + 1 + 6 * 2 * 3)
    trace.without_weights().save(tmp_path / "routes.safetensors")
    assert (tmp_path / "routes.safetensors").stat().st_size < 1200 + 800 * (4 + 1 + 6 * 2)


def test_the_file_is_as_documented(tmp_path):
    make().save(tmp_path / "routes.safetensors")
    with safe_open(tmp_path / "routes.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["version"], header["num_experts"]) == ("expertflow-trace", "1", "8")
    assert json.loads(header["tasks"]) == ["documents", "charts", "documents"]
    assert json.loads(header["meta"]) == {"model": "drawn"}
    tensors = load_file(tmp_path / "routes.safetensors")
    assert tensors["item_tokens"].tolist() == [5, 1, 6]
    assert tensors["item_first"].tolist() == [0, 0, 0]
    assert tensors["experts"].dtype == torch.uint8


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, order=st.data())
def test_items_are_picked_in_order_and_numbered_anew(shapes, order):
    trace = make(shapes)
    picked = order.draw(st.lists(st.integers(0, len(shapes) - 1), max_size=6))
    found = trace.of_items(picked)
    assert found.items == len(picked)
    for new, old in enumerate(picked):
        assert found.tasks[new] == trace.tasks[old]
        for name in ("token_ids", "kind", "position", "experts", "weights"):
            assert torch.equal(getattr(found, name)[found.rows(new)], getattr(trace, name)[trace.rows(old)])


def test_tasks_are_picked_by_name():
    assert make().of_task("documents").tasks == ("documents", "documents")
    with pytest.raises(ExpertFlowError, match="task 'maps': use charts, documents"):
        make().of_task("maps")


def test_generated_tokens_keep_their_items_and_positions():
    found = make().generated()
    assert found.item.tolist() == [0, 0, 2, 2, 2, 2]
    assert found.position.tolist() == [3, 4, 2, 3, 4, 5]
    assert found.items == 3
    assert found.steps(1) == []


def test_steps_are_the_prompt_then_every_generated_token():
    assert make().steps(0) == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert make().steps(1) == [slice(5, 6)]
    assert make().generated().steps(0) == [slice(0, 1), slice(1, 2)]
    for item in (-1, 3):
        with pytest.raises(ExpertFlowError, match=f"item {item} is not in this trace: use 0 to 2"):
            make().steps(item)


def test_paths_say_which_experts_a_token_uses():
    trace = make(experts=257, top_k=3)
    paths = trace.paths()
    assert paths.shape == (12, 3, 257)
    for token in range(12):
        for layer in range(3):
            assert set(paths[token, layer].nonzero().flatten().tolist()) == set(trace.experts[token, layer].tolist())


def slow_requests(trace, groups, phase):
    """Sets, token by token, straight from the definition."""
    for group in groups:
        queues = []
        for item in group:
            tokens = [n for n in range(len(trace)) if trace.item[n] == item]
            prompt = [n for n in tokens if trace.kind[n] != GENERATED]
            queues.append((prompt, [n for n in tokens if trace.kind[n] == GENERATED]))
        passes = [[n for prompt, _ in queues for n in prompt]] if phase == "all" else []
        longest = max((len(answer) for _, answer in queues), default=0)
        passes += [[answer[step] for _, answer in queues if step < len(answer)] for step in range(longest)]
        for tokens in passes:
            if tokens:
                wanted = [{int(e) for n in tokens for e in trace.experts[n, at]} for at in range(trace.layers)]
                yield [sorted(layer) for layer in wanted]


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, rows=st.integers(1, 4), phase=st.sampled_from(["decode", "all"]), seed=st.integers(0, 99))
def test_requests_are_the_distinct_experts_of_every_pass(shapes, rows, phase, seed):
    trace = make(shapes, seed=seed)
    alone = [[item] for item in range(trace.items)]
    assert list(requests(trace, phase)) == list(slow_requests(trace, alone, phase))
    together = [list(range(trace.items))[first : first + rows] for first in range(0, trace.items, rows)]
    assert list(batched_requests(trace, rows, phase)) == list(slow_requests(trace, together, phase))
    backwards = [list(reversed(group)) for group in reversed(together)]
    assert list(grouped_requests(trace, backwards, phase)) == list(slow_requests(trace, backwards, phase))


def test_a_step_of_decode_wants_top_k_experts_and_a_prompt_a_union():
    trace = make(experts=8, top_k=2)
    assert all(len(layer) == 2 for step in requests(trace) for layer in step)
    assert sum(1 for _ in requests(trace, "all")) == 3 + sum(1 for _ in requests(trace)) == 3 + 6


def test_odd_batches_and_phases_are_refused():
    with pytest.raises(ExpertFlowError, match="rows 0 must be at least 1"):
        list(batched_requests(make(), 0))
    with pytest.raises(ExpertFlowError, match="phase 'prefill' is not known: use decode or all"):
        list(requests(make(), "prefill"))


def changed(name, value):
    return dataclasses.replace(make(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_experts", 0, "num_experts 0 must lie between 1 and 32768"),
        ("token_ids", torch.zeros(12).long(), r"token_ids is torch.int64 \(12,\), it must be torch.int32"),
        ("token_ids", torch.tensor(1, dtype=torch.int32), r"token_ids is torch.int32 \(\)"),
        ("kind", torch.zeros(11, dtype=torch.uint8), r"kind is torch.uint8 \(11,\), it must be torch.uint8 \(12,\)"),
        ("kind", torch.full((12,), 7, dtype=torch.uint8), "kind 7 is not known: use 0, 1 or 2"),
        ("kind", torch.tensor([2, 0] * 6, dtype=torch.uint8), "follows a generated one"),
        ("item", torch.arange(12).flip(0).int(), "must ascend from 0 to at most 2"),
        ("item", torch.full((12,), 3, dtype=torch.int32), "must ascend from 0 to at most 2"),
        ("tasks", ("charts",), "must ascend from 0 to at most 0"),
        ("position", torch.zeros(12, dtype=torch.int32), "count up by one"),
        ("position", make().position - 1, "from 0 or later"),
        ("experts", torch.zeros(12, 3, dtype=torch.uint8), r"must be torch.uint8 \(12, layers, top_k\)"),
        ("experts", make().experts.short(), "must be torch.uint8"),
        ("experts", make().experts + 8, "must lie between 0 and 7"),
        ("experts", torch.zeros(12, 3, 2, dtype=torch.uint8), "an expert twice"),
        ("weights", make().weights.float(), "must be float16"),
        ("weights", make().weights[:, :, :1], r"weights is torch.float16 \(12, 3, 1\)"),
        ("weights", make().weights * torch.inf, "must be finite"),
    ],
)
def test_values_that_contradict_each_other_are_refused(name, value, said):
    with pytest.raises(ExpertFlowError, match=said):
        changed(name, value)


@pytest.mark.parametrize("odd", [-1, 8, 256, 264])
def test_experts_outside_are_refused_before_their_dtype_hides_it(odd):
    experts = torch.tensor([[[0, odd]]])
    with pytest.raises(ExpertFlowError, match="must lie between 0 and 7"):
        RoutingTrace.of([1], [0], [0], experts, 8, ["charts"])


def test_gate_weights_beyond_float16_are_refused():
    with pytest.raises(ExpertFlowError, match="finite"):
        RoutingTrace.of([1], [0], [0], torch.tensor([[[0, 1]]]), 8, ["charts"], weights=torch.full((1, 1, 2), 1e6))


@pytest.fixture
def file(tmp_path):
    make().save(tmp_path / "routes.safetensors")
    return tmp_path / "routes.safetensors"


def rewrite(file, tensors=(), header=(), without=()):
    """The file with other tensors or metadata."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | dict(header)
    kept = {name: value for name, value in load_file(file).items() if name not in without} | dict(tensors)
    save_file(kept, file, {name: value for name, value in metadata.items() if name not in without})


INTS = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"header": {"format": "other"}},
            "has format 'other', version '1', where 'expertflow-trace', '1' is read: give",
        ),
        ({"header": {"version": "2"}}, "version '2'"),
        ({"without": ["format"]}, "has format None"),
        ({"without": ["kind", "weights"]}, "lacks kind, weights: restore"),
        ({"without": ["tasks"]}, "tasks a list of texts"),
        ({"header": {"tasks": "[1, 2, 3]"}}, "tasks a list of texts"),
        ({"header": {"tasks": '{"a": 1}'}}, "tasks a list of texts"),
        ({"header": {"meta": '{"a": 1}'}}, "meta an object of texts"),
        ({"header": {"meta": "{"}}, "not JSON"),
        ({"header": {"num_experts": "true"}}, "num_experts True must be an integer"),
        ({"header": {"num_experts": "6"}}, "must lie between 0 and 5"),
        ({"header": {"num_experts": "99999"}}, "must lie between 1 and 32768"),
        ({"header": {"tasks": '["a"]'}}, "must ascend from 0 to at most 0"),
        ({"tensors": {"item_tokens": torch.tensor([5, 1, 5], **INTS)}}, "must say how the 12 tokens belong"),
        ({"tensors": {"item_tokens": torch.tensor([14, -2, 0], **INTS)}}, "must say how the 12 tokens"),
        ({"tensors": {"item_tokens": torch.tensor([5, 7], **INTS)}}, "must say how the 12 tokens"),
        ({"tensors": {"item_tokens": torch.tensor([5.0, 1, 6])}}, "item_tokens torch.float32"),
        ({"tensors": {"item_first": torch.tensor([-1, 0, 0], **INTS)}}, "from 0 or later"),
        ({"tensors": {"token_ids": torch.zeros(3, 4, **INTS)}}, "must say how the 3 tokens"),
        ({"tensors": {"experts": torch.zeros(12, 3, 2, dtype=torch.uint8)}}, "an expert twice"),
    ],
)
def test_damaged_files_are_refused_by_name(file, change, said):
    rewrite(file, **change)
    with pytest.raises(ExpertFlowError, match=said) as raised:
        RoutingTrace.load(file)
    assert str(file) in str(raised.value)


def test_files_that_are_cut_foreign_or_absent_are_refused(file):
    whole = file.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 3], b"", b"routes", whole + b"more"):
        file.write_bytes(content)
        with pytest.raises(ExpertFlowError, match=r"cannot read the trace .*restore the file"):
            RoutingTrace.load(file)
    for path in (file.parent, file.with_name("absent.safetensors")):
        with pytest.raises(ExpertFlowError, match="cannot read the trace"):
            RoutingTrace.load(path)


def test_a_file_that_cannot_be_written_is_refused(file):
    with pytest.raises(ExpertFlowError, match=r"cannot write .*choose another folder"):
        make().save(file / "inside-a-file.safetensors")


def test_kinds_are_what_the_format_says():
    assert (PROMPT_TEXT, PROMPT_IMAGE, GENERATED) == (0, 1, 2)
