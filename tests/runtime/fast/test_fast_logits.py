"""Logits of every decode step against a full forward pass of the plain model over all tokens so far."""

import pytest
import torch
from helpers import fast
from helpers.fast import CONVERSATIONS, asked, load_fast, picture

import expertflow_quant
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.lookahead import LookAhead

STEPS = 7
WINDOW = {"sliding_window": 8}
IMAGES = [asked("Which is larger?", picture(2), picture(3, 48, 32)), asked("?"), asked("And here?", picture(4, 32, 64))]
CASES = [
    ("qwen3_moe", {}, CONVERSATIONS[:3]),
    ("mixtral", WINDOW, CONVERSATIONS[:3]),
    ("gpt_oss", WINDOW, CONVERSATIONS[:3]),
    ("qwen3_vl_moe", {}, IMAGES),
]


def full_logits(plain, conversation, generated):
    """The plain model's logits after a prompt, alone and unpadded, and the tokens generated since."""
    inputs = dict(plain._encode([conversation], Sampling(1))[0].inputs)
    more = torch.tensor([generated], dtype=torch.int64)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], dim=1)
    with torch.inference_mode():
        return plain.model(**inputs, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("memory", ["100%", "60%"])
@pytest.mark.parametrize(("family", "config", "conversations"), CASES, ids=[case[0] for case in CASES])
def test_each_step_sees_all_tokens_before(family, config, conversations, memory, tmp_path):
    folder = fast.checkpoint(tmp_path / family, family, config=config)
    plain, engine = expertflow_quant.load(folder, fast=False), load_fast(folder, memory)
    graphs, rows = engine.runner.graphs, len(conversations)
    bucket = graphs.bucket(rows)
    (prompts,) = engine._encode(conversations, Sampling(STEPS))
    assert len(set(prompts.prompt_tokens)) == rows
    assert min(prompts.prompt_tokens) > 8
    fed = [[] for _ in conversations]
    with torch.inference_mode():
        logits = engine.runner.prefill(prompts, 0)
        graphs.active[:rows] = True
        for step in range(STEPS):
            for row, conversation in enumerate(conversations):
                torch.testing.assert_close(logits[row], full_logits(plain, conversation, fed[row]), rtol=0, atol=1e-4)
                fed[row].append((37 * step + 11 * row + 40) % 250)  # not what the model would say
                graphs.tokens[row, 0] = fed[row][-1]
            graphs.step(bucket)
            logits = graphs.logits(bucket)[:rows]
    assert graphs.kv.lengths.tolist()[:rows] == [count + STEPS for count in prompts.prompt_tokens]
    assert graphs.kv.lengths[rows:].tolist() == [0] * (graphs.kv.rows - rows)
    assert torch.equal(graphs.picked[:rows], logits.argmax(dim=-1))


def test_a_window_is_seen_at_all(tmp_path):
    """So that the cases above say something about it."""
    narrow, wide = (
        load_fast(fast.checkpoint(tmp_path / str(window), "gpt_oss", config={"sliding_window": window}))
        for window in (8, 128)
    )
    logits = [one.runner.prefill(one._encode(CONVERSATIONS[:1], Sampling(1))[0], 0) for one in (narrow, wide)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def decoded(runner, prompts, steps):
    """The first tokens of every row and those of ``steps`` steps, all rows of a bucket of one."""
    graphs = runner.graphs
    with torch.inference_mode():
        graphs.tokens[:1, 0] = runner.prefill(prompts, 0).argmax(dim=-1)
        graphs.active[0] = True
        made = [int(graphs.tokens[0, 0])]
        for _ in range(steps):
            graphs.step(1)
            made.append(int(graphs.tokens[0, 0]))
    return made


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("guess", ["right", "wrong"])
def test_a_look_ahead_only_moves_bytes_early(guess, distance, tmp_path):
    folder = fast.checkpoint(tmp_path / "even", "qwen3_moe", lambda layer, expert: "int4-g16")
    engine = load_fast(folder, rows=1)
    options = FastOptions(rows=1, room=160)
    (prompts,) = engine._encode(CONVERSATIONS[:1], Sampling(8))
    routed = []

    def recorded(layer, ids):
        if len(ids) == 1:
            routed.append((layer, ids.clone()))
        return ids

    recording = fast.rebuilt(engine, "60%", options, routes=recorded)
    wanted = decoded(recording, prompts, 6)
    missed = sum(layer.misses for layer in recording.resident.stats.layers)
    assert missed > 0
    told = {layer: [ids for at, ids in routed if at == layer] for layer in (0, 1)}

    def guessed(layer, hidden):
        ids = told[layer].pop(0)
        return ids if guess == "right" else (ids + 1) % 8

    runner = fast.rebuilt(
        engine, "60%", options, make_ahead=lambda *_: LookAhead(guessed, distance, torch.device("cpu"))
    )
    assert decoded(runner, prompts, 6) == wanted
    assert told == {0: [], 1: []}
    assert runner.resident.prefetched_bytes > 0
    misses = sum(layer.misses for layer in runner.resident.stats.layers)
    assert misses == 0 if guess == "right" else misses > missed / 2


def test_routes_may_be_told_instead(folder_of):
    engine = load_fast(folder_of("qwen3_moe"), rows=2)
    options = FastOptions(rows=2, room=160)
    (prompts,) = engine._encode(CONVERSATIONS[:1], Sampling(8))
    first = fast.rebuilt(engine, "40%", options, routes=lambda layer, ids: torch.full_like(ids, layer))
    decoded(first, prompts, 3)
    again = fast.rebuilt(engine, "40%", options)
    decoded(again, prompts, 3)
    assert [layer.requests for layer in first.resident.stats.layers] == [3, 3]
    assert [layer.requests for layer in again.resident.stats.layers] == [6, 6]
