"""Captured steps on a GPU: the tokens of the plain path in float32, its logits in bf16 at real widths."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import fast
from helpers.fast import RandomExperts, random_moe, smallest_budget
from torch.nn import functional

import expertflow_quant
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import Format
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.fast.build import FastOptions, build_fast
from expertflow_quant.runtime.fast.decode import BUCKETS
from expertflow_quant.runtime.fast.lookahead import LookAhead
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.quantizer import attach_cache
from expertflow_quant.samples import make_items

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]

DEVICE = "cuda"
SHIPPED = Path(__file__).parents[3] / "calibration" / "shipped" / "moe"
NEW_TOKENS = 12
ROOM = 320
MIXED = ("int4-g32", "int8-g32", "int2-g32", "bf16")


@pytest.fixture(autouse=True, scope="module")
def full_float32():
    """No TF32: float32 means float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model in int4, and in a format of its own for every expert."""
    if not (SHIPPED / "config.json").is_file():
        pytest.skip(f"no trained model in {SHIPPED}")
    root = tmp_path_factory.mktemp("shipped")
    formats = {expert: Format.parse(MIXED[expert % 4]) for expert in range(16)}
    plans = {"int4": "int4-g32", "mixed": Plan(Format.parse("int4-g32"), dict.fromkeys(range(6), formats))}
    for name, plan in plans.items():
        expertflow_quant.quantize_model(SHIPPED, root / name, method="rtn", plan=plan, device=DEVICE)
    return root


@pytest.fixture(scope="module")
def items():
    """64 that no model here has learned from, long and short questions side by side."""
    made = zip(make_items("chart", "test", 32), make_items("document", "test", 32))
    return [item.messages for pair in made for item in pair]


@pytest.fixture(scope="module")
def wanted(shipped, items):
    """The plain path's tokens, by checkpoint."""
    found = {}
    for name in ("int4", "mixed"):
        engine = expertflow_quant.load(shipped / name, device=DEVICE, dtype=torch.float32, fast=False)
        found[name] = in_parts(engine, items, 8)
    return found


def fast_engine(folder, memory, rows=8, **options):
    sizes = FastOptions(rows=rows, room=ROOM, **options)
    return expertflow_quant.load(folder, memory, DEVICE, torch.float32, fast=True, options=sizes)


def in_parts(engine, items, rows):
    """The tokens of all items, ``rows`` at a time."""
    parts = [items[first : first + rows] for first in range(0, len(items), rows)]
    return [row for part in parts for row in fast.tokens(engine, part, NEW_TOKENS)]


def differing(got, want):
    return [index for index, (one, other) in enumerate(zip(got, want, strict=True)) if one != other]


@pytest.mark.parametrize("memory", ["100%", "90%", "25%", "smallest"])
@pytest.mark.parametrize("name", ["int4", "mixed"])
def test_tokens_are_those_of_the_plain_path(name, memory, shipped, items, wanted):
    if memory == "smallest":
        memory = smallest_budget(expertflow_quant.load(shipped / name, fast=False))
    engine = fast_engine(shipped / name, memory)
    graphs = engine.runner.graphs
    assert not graphs.streams(1)
    assert graphs.streams(8) == (memory not in ("100%", "90%"))  # eight rows want more than a few slots hold
    for rows in (8, 4, 2, 1):
        assert differing(in_parts(engine, items, rows), wanted[name]) == [], f"{rows} rows"
    assert (engine.stats.misses == 0) == (memory == "100%")


@pytest.mark.parametrize("memory", ["100%", "25%"])
@pytest.mark.parametrize("name", ["int4", "mixed"])
def test_tokens_of_the_largest_batches_are_those_of_the_plain_path(name, memory, shipped, items, wanted):
    engine = fast_engine(shipped / name, memory, rows=32, captured=(16, 32))
    for rows in (32, 16):
        assert engine.runner.graphs.streams(rows) == (memory == "25%")
        assert differing(in_parts(engine, items, rows), wanted[name]) == [], f"{rows} rows"


def test_uncompiled_layers_and_padding_rows(shipped, items, wanted):
    engine = fast_engine(shipped / "mixed", "40%", compile_layers=False)
    for rows in (7, 3, 5):
        assert differing(fast.tokens(engine, items[:rows], NEW_TOKENS), wanted["mixed"][:rows]) == []
    stream = engine.stream(items[2], NEW_TOKENS)
    assert list(stream)
    assert stream.last.token_ids == wanted["mixed"][2]


def test_a_look_ahead_without_anything_to_guess_is_captured_too(shipped, items, wanted):
    engine = fast_engine(shipped / "int4", "100%", rows=2, look_ahead="next-gate")
    assert differing(fast.tokens(engine, items[:2], NEW_TOKENS), wanted["int4"][:2]) == []


@pytest.mark.parametrize("memory", ["40%", "90%"])
def test_a_trained_predictor_looks_ahead_in_captured_steps(memory, shipped, items, wanted):
    predictor = SHIPPED.parents[1] / "predictor" / "shipped" / "ids"
    engine = fast_engine(shipped / "int4", memory, rows=4, look_ahead=str(predictor))
    for rows in (4, 1):
        assert differing(in_parts(engine, items[:16], rows), wanted["int4"][:16]) == [], f"{rows} rows"
    assert engine.runner.resident.prefetched_bytes > 0


def prefilled(runner, engine, items):
    """The rows' prompts read, everything ready for a step."""
    graphs, rows = runner.graphs, len(items)
    (prompts,) = engine._encode(items, Sampling(NEW_TOKENS))
    graphs.active.zero_()
    graphs.kv.lengths.zero_()
    graphs.tokens[:rows, 0] = runner.prefill(prompts, 0).argmax(dim=-1)
    graphs.active[:rows] = True


def stepped(runner, engine, items, steps=6):
    """Logits ``[steps, rows, vocabulary]`` of steps after the prompts."""
    graphs, rows, found = runner.graphs, len(items), []
    with torch.inference_mode():
        prefilled(runner, engine, items)
        for _ in range(steps):
            graphs.step(graphs.bucket(rows))
            found.append(graphs.logits(graphs.bucket(rows))[:rows].clone())
    return torch.stack(found)


@pytest.fixture(scope="module")
def engine(shipped):
    """Too few slots for all, enough for eight rows: every bucket is captured."""
    made = fast_engine(shipped / "int4", "90%")
    assert not any(made.runner.graphs.streams(bucket) for bucket in made.runner.graphs.buckets)
    assert not any(made.runner.resident.all_resident(layer) for layer in range(6))
    return made


def test_a_graph_does_the_same_after_others_ran(engine, items):
    first = {rows: stepped(engine.runner, engine, items[:rows]) for rows in (1, 2, 4, 8)}
    for rows in (4, 1, 8, 2, 1):
        assert torch.equal(stepped(engine.runner, engine, items[:rows]), first[rows]), f"{rows} rows"


def test_rows_do_not_depend_on_each_other(engine, items):
    together = stepped(engine.runner, engine, items[:4])
    for row in range(4):
        alone = stepped(engine.runner, engine, items[row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=0, atol=5e-4)


def test_a_step_never_waits_for_the_device(engine, items):
    graphs = engine.runner.graphs
    with torch.inference_mode():
        for rows in (1, 2, 4, 8):
            prefilled(engine.runner, engine, items[:rows])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(4):
                    graphs.step(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_captured_never_waits_either(engine, items):
    """So that nothing in it could have been frozen into a graph."""
    graphs = engine.runner.graphs
    with torch.inference_mode():
        for rows in (1, 8):
            prefilled(engine.runner, engine, items[:rows])
            graphs.step(rows)
            captured = graphs.logits(rows)
            want = captured.clone()
            prefilled(engine.runner, engine, items[:rows])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                graphs._run(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            got, graphs._logits[rows] = graphs.logits(rows), captured
            torch.testing.assert_close(got, want, rtol=0, atol=5e-4)


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("guess", ["right", "wrong"])
def test_a_look_ahead_only_moves_bytes_early(guess, distance, engine, items):
    options = FastOptions(rows=1, room=ROOM)
    layers, width, experts, steps = 6, 2, 16, 8
    seen = torch.zeros(layers, 1, width, dtype=torch.int64, device=DEVICE)

    def recorded(layer, ids):
        if len(ids) == 1:
            seen[layer].copy_(ids)
        return ids

    def run(runner, told=None):
        made, ids, graphs = [], [], runner.graphs
        with torch.inference_mode():
            prefilled(runner, engine, items[:1])
            for step in range(steps):
                if told is not None:
                    shown.copy_(told[step])
                graphs.step(1)
                made.append(graphs.logits(1).clone())
                ids.append(seen.clone())
        return torch.stack(made), ids, sum(layer.misses for layer in runner.resident.stats.layers)

    want, told, missed = run(fast.rebuilt(engine, "40%", options, routes=recorded))
    assert missed > 0
    shown = torch.zeros_like(seen)
    if guess == "wrong":
        told = [(ids + 1) % experts for ids in told]
    runner = fast.rebuilt(
        engine,
        "40%",
        options,
        make_ahead=lambda *_: LookAhead(lambda layer, hidden: shown[layer], distance, torch.device(DEVICE)),
    )
    got, _, misses = run(runner, told)
    assert torch.equal(got.argmax(dim=-1), want.argmax(dim=-1))
    torch.testing.assert_close(got, want, rtol=0, atol=5e-4)
    assert runner.resident.prefetched_bytes > 0
    assert misses == 0 if guess == "right" else misses > 0


REAL = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
}
FORMATS = {"int4": ("int4-g128",), "mixed": ("int4-g128", "int8-g128", "int2-g128", "bf16")}
CLEAR_TOKEN = 0.1
"""Deviations of a row's logits by which its first token must lead to survive rounding to bf16."""


def random_prompts(lengths, vocabulary):
    """Left-padded random tokens."""
    generator = torch.Generator().manual_seed(5)
    width = max(lengths)
    ids = torch.randint(1, vocabulary, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return Prompts({"input_ids": ids * mask, "attention_mask": mask}, tuple(lengths), (0,) * len(lengths))


class ToldRoutes:
    """Experts drawn for every place of every row, told to all paths alike: rounding decides nothing. With routes of
    their own, a token in thirty is routed otherwise in bf16, and all later ones attend to it."""

    def __init__(self, rows, places):
        generator = torch.Generator().manual_seed(9)
        luck = torch.rand(REAL["num_hidden_layers"], rows, places, REAL["num_experts"], generator=generator)
        self.drawn = luck.argsort(dim=-1)[..., : REAL["num_experts_per_tok"]].to(DEVICE)
        self.step = self.drawn[:, :, 0].clone()  # captured steps read it
        self.prompt = None

    def fast(self, layer, ids):
        """What ``build_fast`` asks for ids ``[tokens, top_k]``."""
        return self.step[layer, : len(ids)] if self.prompt is None else self.prompt[layer]

    def of_prompts(self, lengths):
        """For prompts of ``lengths`` tokens, padded on the left."""
        width = max(lengths)
        rows = [self.drawn[:, row, :length] for row, length in enumerate(lengths)]
        padded = [functional.pad(row, (0, 0, width - row.shape[1], 0)) for row in rows]
        self.prompt = torch.stack(padded, dim=1).flatten(1, 2)

    def of_step(self, places):
        """For one token a row, each at its own place."""
        self.prompt = None
        for row, place in enumerate(places):
            self.step[:, row] = self.drawn[:, row, place]

    def hook(self, layer, row):
        """A forward hook of a router that reads row ``row`` from its start."""
        return lambda module, args, made: (*made[:2], self.drawn[layer, row, : len(made[2])])


def decode_told(runner, told, prompts, following, bucket):
    """Logits ``[rows, steps + 1, vocabulary]`` after the prompts and after each of ``following [rows, steps]``."""
    graphs, rows = runner.graphs, len(prompts)
    with torch.inference_mode():
        graphs.active.zero_()
        graphs.kv.lengths.zero_()
        told.of_prompts(prompts.prompt_tokens)
        found = [runner.prefill(prompts, 0).clone()]
        graphs.active[:rows] = True
        for step in range(following.shape[1]):
            told.of_step([count + step for count in prompts.prompt_tokens])
            graphs.tokens[:rows, 0] = following[:, step]
            graphs.step(bucket)
            found.append(graphs.logits(bucket)[:rows].clone())
    return torch.stack(found, dim=1)


def plain_logits(model, told, prompts, following):
    """The same from full forward passes of the plain path, row by row."""
    ids, steps, logits = prompts.inputs["input_ids"], following.shape[1] + 1, []
    for row, count in enumerate(prompts.prompt_tokens):
        gates = [layer.mlp.gate for layer in model.model.layers]
        hooks = [gate.register_forward_hook(told.hook(layer, row)) for layer, gate in enumerate(gates)]
        whole = torch.cat([ids[row, -count:].to(following.device), following[row]])
        with torch.inference_mode():
            logits.append(model(input_ids=whole[None], use_cache=False).logits[0, -steps:])
        for hook in hooks:
            hook.remove()
    return torch.stack(logits)


def check_logits(got, plain, exact):
    """Logits are about as near to those in float32 as the plain path's in bf16 are, and greedy tokens that lead
    clearly are the same."""
    ours, theirs = (relative(each, exact) for each in (got, plain))
    told = f"median {ours.median():.4f}, plain path {theirs.median():.4f}; largest {ours.max():.4f}, {theirs.max():.4f}"
    print(told)
    assert float(ours.median()) < 1.25 * float(theirs.median()), told
    assert float(ours.max()) < 1.5 * float(theirs.max()), told
    assert float(theirs.median()) < 0.02, told
    best = exact.topk(2, dim=-1)[0]
    sure = best[..., 0] - best[..., 1] > CLEAR_TOKEN * exact.std(dim=-1)
    assert sure.float().mean() > 0.25
    assert torch.equal(got.argmax(dim=-1)[sure], exact.argmax(dim=-1)[sure])


def relative(got, want):
    return (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1)


@pytest.fixture(scope="module", params=FORMATS)
def formats(request):
    return FORMATS[request.param]


@pytest.fixture(scope="module")
def real(formats):
    config = transformers.Qwen3MoeConfig(**REAL)
    return random_moe(config, formats, DEVICE, torch.bfloat16)


@pytest.fixture(scope="module")
def exact(real, formats):
    """The same weights on the plain path in float32."""
    model = random_moe(real.config, formats, DEVICE, torch.float32)
    model.load_state_dict(real.state_dict())
    attach_cache(model, model.expert_store.nbytes)
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("memory", ["100%", "80%", "25%", "smallest"])
def test_logits_at_real_widths(memory, real, exact):
    store = real.expert_store
    parts = {"100%": store.nbytes, "80%": store.nbytes * 4 // 5, "25%": store.nbytes // 4}
    budget = parts.get(memory, 2 * max(store.layers[0].nbytes))
    told = ToldRoutes(BUCKETS[-1], 128)
    runner = build_fast(real, None, frozenset(), budget, FastOptions(rows=BUCKETS[-1], room=128), routes=told.fast)
    if len(set(store.layers[0].nbytes)) == 1:
        assert store.nbytes == 2 * 128 * store.layers[0].nbytes[0]
        streamed = {"100%": (), "80%": (), "25%": (8, 16, 32), "smallest": BUCKETS[1:]}[memory]
        assert tuple(filter(runner.graphs.streams, BUCKETS)) == streamed
    cases = []
    for bucket in BUCKETS:
        lengths = [3 + 37 * (row + 1) % 62 for row in range({4: 3, 16: 13}.get(bucket, bucket))]  # some rows stay empty
        prompts = random_prompts(lengths, REAL["vocab_size"])
        following = torch.randint(1, REAL["vocab_size"], (len(lengths), 6), device=DEVICE)
        cases.append((prompts, following, decode_told(runner, told, prompts, following, bucket)))
    if memory != "100%":
        assert runner.stats.misses > 0
    attach_cache(real, store.nbytes)
    real.set_attn_implementation("sdpa")
    for prompts, following, got in cases:
        check_logits(got, *(plain_logits(model, told, prompts, following) for model in (real, exact)))


def test_records_of_the_random_model_differ(real):
    assert isinstance(real.expert_store.source, RandomExperts)
    first, second = (real.expert_store.record(0, expert) for expert in (0, 1))
    assert not torch.equal(first, second)
