"""Answers of the fast path, without graphs: the same tokens as transformers' own generate on the plain path."""

import threading

import pytest
import torch
from helpers import fast
from helpers.fast import CONVERSATIONS, asked, load_fast, one_by_one, picture, smallest_budget, tokens

import expertflow_quant
from expertflow_quant.offload.budget import BudgetError
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.prompts import PromptError
from expertflow_quant.runtime.stream import Cancellable
from expertflow_quant.runtime.streamed import StreamOptions

TEXT = "qwen3_moe"
VISION = "qwen3_vl_moe"


@pytest.fixture(scope="module")
def plain(plain_of):
    return plain_of(TEXT)


@pytest.fixture(scope="module")
def engine(folder_of):
    """Eight rows, half of the experts resident."""
    return load_fast(folder_of(TEXT), "50%", rows=8)


@pytest.mark.parametrize("family", fast.TAKEN)
def test_every_family_at_every_budget(family, folder_of, plain_of):
    plain = plain_of(family)
    wanted = one_by_one(plain, CONVERSATIONS[:3])
    assert len(set(wanted)) == 3
    least = smallest_budget(plain)
    for memory in ("100%", max(least, plain.expert_bytes * 3 // 10), least):
        engine = load_fast(folder_of(family), memory)
        assert tokens(engine, CONVERSATIONS[:3]) == wanted  # three rows in a bucket of four
        assert (engine.stats.misses > 0) == (memory != "100%")
    assert engine.runner.resident.device_bytes == 0
    with pytest.raises(BudgetError, match="no room to stage two experts"):
        load_fast(folder_of(family), least - 1)


@pytest.mark.parametrize("rows", range(1, 9))
def test_buckets_and_their_padding_rows(rows, engine, plain):
    assert tokens(engine, CONVERSATIONS[:rows]) == one_by_one(plain, CONVERSATIONS[:rows])


def test_a_batch_knows_nothing_of_the_one_before(engine, plain):
    tokens(engine, CONVERSATIONS, 20)
    reverse = CONVERSATIONS[2::-1]
    assert tokens(engine, reverse, 16) == one_by_one(plain, reverse, 16)


def counted_passes(engine, monkeypatch):
    """(first row, prompts) of every prefill from now on."""
    counted, prefill = [], engine.runner.prefill

    def spied(prompts, first):
        counted.append((first, len(prompts)))
        return prefill(prompts, first)

    monkeypatch.setattr(engine.runner, "prefill", spied)
    return counted


def test_positions_stay_where_nobody_answers(folder_of):
    engine = load_fast(folder_of(VISION), rows=4)
    for _ in range(2):
        tokens(engine, CONVERSATIONS[:3], 12)
        assert (engine.runner.graphs.positions[..., :3, :] > 12).all()
        assert (engine.runner.graphs.positions[..., 3, :] == 0).all()


def test_more_conversations_than_rows(folder_of, plain, monkeypatch):
    engine = load_fast(folder_of(TEXT), "30%", rows=2)
    counted = counted_passes(engine, monkeypatch)
    assert tokens(engine, CONVERSATIONS[:5]) == one_by_one(plain, CONVERSATIONS[:5])
    assert counted == [(0, 2), (0, 2), (0, 1)]


def test_several_prefills_for_one_decode(folder_of, plain, monkeypatch):
    engine = load_fast(folder_of(TEXT), "30%", rows=8, room=80, prefill_tokens=1)
    counted = counted_passes(engine, monkeypatch)
    assert tokens(engine, CONVERSATIONS[:7]) == one_by_one(plain, CONVERSATIONS[:7])
    assert len(counted) > 2
    assert [first for first, _ in counted] == [sum(n for _, n in counted[:i]) for i in range(len(counted))]
    assert sum(n for _, n in counted) == 7


def test_staging_on_demand_and_decoding_on_load_change_nothing(folder_of, plain):
    for stage, multiply in (("on demand", "in kernel"), ("ahead", "on load")):
        engine = load_fast(folder_of(TEXT), "30%", stream=StreamOptions(multiply, stage))
        assert tokens(engine, CONVERSATIONS[:3]) == one_by_one(plain, CONVERSATIONS[:3])


PICTURED = [
    asked("What is shown here, in a word?", picture(1)),
    asked("?"),
    asked("Which of them is larger?", picture(2), picture(3, 48, 32)),
    asked("And here?", picture(4, 32, 64)),
]


@pytest.mark.parametrize("prefill_tokens", [1000, 1])
def test_images_of_any_number_and_size_in_a_row(prefill_tokens, folder_of, plain_of, monkeypatch):
    engine = load_fast(folder_of(VISION), "30%", room=120, prefill_tokens=prefill_tokens)
    counted = counted_passes(engine, monkeypatch)
    wanted = one_by_one(plain_of(VISION), PICTURED, 14)
    assert len(set(wanted)) == 4
    assert tokens(engine, PICTURED, 14) == wanted
    assert (len(counted) == 1) == (prefill_tokens > 1)
    assert "".join(engine.stream(PICTURED[2], 14)) == engine.generate([PICTURED[2]], 14)[0].text


def test_an_image_only_matters_to_its_own_row(folder_of):
    engine = load_fast(folder_of(VISION))
    first = tokens(engine, [PICTURED[0], PICTURED[1]], 12)
    other = tokens(engine, [asked("What is shown here, in a word?", picture(77)), PICTURED[1]], 12)
    assert first[1] == other[1]
    assert first[0] != other[0]


def test_usage_is_counted_like_on_the_plain_path(folder_of, plain_of):
    fast_answers = load_fast(folder_of(VISION)).generate(PICTURED, 3)
    for got, want in zip(fast_answers, plain_of(VISION).generate(PICTURED, 3), strict=True):
        assert (got.prompt_tokens, got.image_tokens, got.text) == (want.prompt_tokens, want.image_tokens, want.text)
        assert (got.finish_reason, got.completion_tokens) == ("length", 3)


def test_stop_texts_end_rows_of_a_batch_each_for_itself(engine):
    free = engine.generate(CONVERSATIONS[:5], 16)
    stop = next(text for one in free for text in one.text[4:8] if text.isascii())
    assert 0 < sum(stop in whole.text for whole in free) < 5
    for whole, answer in zip(free, engine.generate(CONVERSATIONS[:5], 16, stop=[stop]), strict=True):
        assert answer.text == whole.text.split(stop)[0]
        assert answer.token_ids == whole.token_ids[: answer.completion_tokens]
        assert answer.finish_reason == ("stop" if stop in whole.text else whole.finish_reason)
    row = next(i for i, whole in enumerate(free) if stop in whole.text)
    stream = engine.stream(CONVERSATIONS[row], 16, stop=stop)
    assert "".join(stream) == free[row].text.split(stop)[0]
    assert stream.last.finish_reason == "stop"


def test_an_end_token_ends_its_row_and_no_other(folder_of, plain, monkeypatch):
    free = one_by_one(plain, CONVERSATIONS[:3], 14)
    end = next(token for token in free[1][3:8] if token not in free[0])
    engine = load_fast(folder_of(TEXT), "30%")
    monkeypatch.setattr(engine, "end_ids", frozenset({2, end}))
    monkeypatch.setattr(engine.runner, "_end_ids", frozenset({2, end}))
    active = []
    step = engine.runner.graphs.step
    monkeypatch.setattr(
        engine.runner.graphs, "step", lambda bucket: (active.append(engine.runner.graphs.active.tolist()), step(bucket))
    )
    answers = engine.generate(CONVERSATIONS[:3], 14)
    assert answers[1].finish_reason == "stop"
    for whole, answer in zip(free, answers, strict=True):
        ended = whole.index(end) + 1 if end in whole else 14
        assert answer.token_ids == whole[:ended]
    assert active[0] == [True, True, True, False]  # the bucket's fourth row is padding
    assert active[-1][:3] == [end not in free[0], False, end not in free[2]]


def test_no_step_is_taken_when_all_rows_have_ended(folder_of, plain, monkeypatch):
    free = one_by_one(plain, CONVERSATIONS[:2], 12)
    engine = load_fast(folder_of(TEXT))
    monkeypatch.setattr(engine.runner, "_end_ids", frozenset({free[0][2], free[1][2]}))
    steps, step = [], engine.runner.graphs.step
    monkeypatch.setattr(engine.runner.graphs, "step", lambda bucket: (steps.append(bucket), step(bucket)))
    engine.generate(CONVERSATIONS[:2], 12)
    assert 0 < len(steps) <= 3
    steps.clear()
    engine.generate(CONVERSATIONS[:2], 1)
    assert steps == []


def test_a_stream_says_what_generate_says(engine):
    wanted = engine.generate([CONVERSATIONS[1]], 12)[0]
    stream = engine.stream(CONVERSATIONS[1], 12)
    assert "".join(stream) == wanted.text
    assert stream.last is engine.last
    assert stream.last.token_ids == wanted.token_ids
    assert (stream.last.prompt_tokens, stream.last.finish_reason) == (wanted.prompt_tokens, "length")


def test_closing_a_stream_ends_the_generation(engine):
    wanted = tokens(engine, [CONVERSATIONS[1]], 3)[0]
    stream = engine.stream(CONVERSATIONS[1], 100)
    for _ in range(3):
        next(stream)
    stream.close()
    assert stream.last.token_ids == wanted
    assert not [thread for thread in threading.enumerate() if thread.name == "expertflow-stream"]
    assert tokens(engine, [CONVERSATIONS[1]], 3)[0] == wanted  # nothing was left behind


def test_a_row_that_nobody_reads_any_more_wants_no_experts(engine, monkeypatch):
    batches = engine._encode(CONVERSATIONS[:3], Sampling(6))
    wanted = engine.runner.run(batches, Sampling(6))
    graphs, active = engine.runner.graphs, []
    step = graphs.step
    monkeypatch.setattr(graphs, "step", lambda bucket: (active.append(graphs.active.tolist()[:3]), step(bucket)))
    cancellable = Cancellable()
    cancellable.rows.add(1)
    rows = engine.runner.run(batches, Sampling(6), None, cancellable)
    assert rows == [wanted[0], wanted[1][:1], wanted[2]]
    assert active == [[True] * 3] + [[True, False, True]] * 4


def test_a_row_that_has_ended_wants_no_experts(engine, monkeypatch):
    """Nor in the step that has begun when the host reads its last token."""
    batches = engine._encode(CONVERSATIONS[:3], Sampling(6))
    wanted = engine.runner.run(batches, Sampling(6))
    ends = frozenset({wanted[0][1], wanted[1][3]})
    expected = [next((row[: at + 1] for at, token in enumerate(row) if token in ends), row) for row in wanted]
    assert len(set(map(len, expected))) > 1
    monkeypatch.setattr(engine.runner, "_end_ids", ends)
    graphs, active = engine.runner.graphs, []
    step = graphs.step
    monkeypatch.setattr(graphs, "step", lambda bucket: (active.append(graphs.active.tolist()[:3]), step(bucket)))
    assert engine.runner.run(batches, Sampling(6)) == expected
    steps = min(5, max(map(len, expected)))
    assert active == [[len(row) > step + 1 or len(row) == 6 for row in expected] for step in range(steps)]


def test_callers_take_turns(engine):
    wanted = tokens(engine, CONVERSATIONS[:2], 8)
    streams = [engine.stream(conversation, 8) for conversation in CONVERSATIONS[:2]]
    got = [None] * 2

    def read(index):
        "".join(streams[index])
        got[index] = streams[index].last.token_ids

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == wanted


def test_what_a_pass_raises_reaches_the_reader_and_leaves_no_pass(engine, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk on fire")

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner.streamed, "layer", broken)
        with pytest.raises(OSError, match="disk on fire"):
            list(engine.stream(CONVERSATIONS[1], 4))
        with pytest.raises(OSError, match="disk on fire"):
            engine.generate([CONVERSATIONS[1]], 4)
    assert passes.current() is None
    assert len(tokens(engine, [CONVERSATIONS[1]], 4)[0]) == 4


def test_a_step_that_broke_off_leaves_no_slot_without_its_record(folder_of, plain, monkeypatch):
    engine = load_fast(folder_of(TEXT), "60%")
    wanted = one_by_one(plain, CONVERSATIONS[:3])
    fill, left = engine.runner.resident.fill, []

    def broken(layer):
        if not left.pop():
            raise KeyboardInterrupt
        fill(layer)

    for good in (2, 3, 5, 6, 8):
        left[:] = [False, *[True] * good]
        with monkeypatch.context() as patched:
            patched.setattr(engine.runner.resident, "fill", broken)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([CONVERSATIONS[0]], 10)
        assert tokens(engine, CONVERSATIONS[:3]) == wanted


def test_sampling_is_repeated_by_its_seed_and_leaves_the_global_generator_alone(engine):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = [tokens(engine, CONVERSATIONS[:3], 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert torch.equal(state, torch.get_rng_state())
    greedy = tokens(engine, CONVERSATIONS[:3], 12)
    assert drawn[0] != greedy
    assert tokens(engine, CONVERSATIONS[:3], 12, temperature=1.0, top_p=1e-6, seed=0) == greedy
    assert all(len(row) == 12 for row in tokens(engine, CONVERSATIONS[:3], 12, temperature=0.8, top_p=0.9))


def test_equal_conversations_are_drawn_anew_in_every_part_of_a_call(folder_of):
    engine = load_fast(folder_of(TEXT), rows=2)
    drawn = [tokens(engine, CONVERSATIONS[:1] * 6, 12, temperature=1.5, seed=seed) for seed in (-3, -3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 6
    assert tokens(engine, CONVERSATIONS[:1] * 2, 12, temperature=1.5, seed=-3) == drawn[0][:2]


def test_the_room_of_a_row_is_kept_to_and_can_be_filled(folder_of, plain):
    engine = load_fast(folder_of(TEXT), "30%", rows=2, room=64)
    assert engine.context == 64
    used = engine.generate([CONVERSATIONS[0]], 1)[0].prompt_tokens
    full = [CONVERSATIONS[0], CONVERSATIONS[2]]
    assert tokens(engine, full, 64 - used) == one_by_one(plain, full, 64 - used)
    with pytest.raises(PromptError, match=rf"\(--context\) of 64: .* at most {64 - used}"):
        engine.generate(full, 65 - used)
    with pytest.raises(PromptError, match="--context"):
        engine.stream(asked("x" * 64), 1)
    wide = load_fast(folder_of(TEXT), room=1000)
    assert wide.context == 256  # the model's own


def test_no_conversations_no_answers(engine):
    assert engine.generate([]) == []


def test_counts_add_up(tmp_path):
    folder = fast.checkpoint(tmp_path / "even", TEXT, lambda layer, expert: "int4-g16")
    engine = load_fast(folder, "40%", rows=4)
    record = engine.model.expert_store.layers[0].nbytes[0]
    engine.reset_stats()
    engine.generate([CONVERSATIONS[0]], 6)
    stats = engine.stats
    assert sum(layer.requests for layer in stats.layers) == 5 * 2 * 2  # steps, layers, experts of a token
    assert all(layer.misses > 0 for layer in stats.layers)
    assert stats.requests > sum(layer.requests for layer in stats.layers)  # and those of the prefill
    assert stats.bytes_moved == stats.misses * record
    assert 0 < stats.hit_rate < 1
    engine.reset_stats()
    assert (engine.stats.requests, engine.stats.bytes_moved) == (0, 0)
    assert engine.device_expert_bytes <= engine.expert_bytes * 0.4
    assert engine.expert_bytes == 2 * 8 * record


def test_a_single_row_is_counted_where_everything_is_resident(folder_of):
    engine = load_fast(folder_of(TEXT))
    requests = []
    for count in (1, 6):
        engine.reset_stats()
        engine.generate([CONVERSATIONS[0]], count)
        requests.append(engine.stats.requests)
    assert requests[1] - requests[0] == 5 * 2 * 2
    assert (engine.stats.misses, engine.stats.bytes_moved) == (0, 0)


def test_steps_that_stream_are_counted(tmp_path):
    folder = fast.checkpoint(tmp_path / "even", TEXT, lambda layer, expert: "int4-g16")
    engine = load_fast(folder, "30%", rows=8)
    assert [engine.runner.graphs.streams(bucket) for bucket in (1, 2, 4, 8)] == [False, True, True, True]
    engine.reset_stats()
    engine.generate(CONVERSATIONS, 4)
    stats = engine.stats
    assert sum(layer.requests for layer in stats.layers) == 0
    assert stats.bytes_moved == stats.misses * engine.model.expert_store.layers[0].nbytes[0] > 0


def test_steps_that_stream_bring_what_the_rows_still_under_way_want(tmp_path):
    folder = fast.checkpoint(tmp_path / "even", TEXT, lambda layer, expert: "int4-g16")
    engine = load_fast(folder, "30%", rows=8, stream=StreamOptions(ahead_coverage=0.85))
    assert engine.runner.graphs.streams(8)
    batches, cancellable = engine._encode(CONVERSATIONS, Sampling(30)), Cancellable()
    moved = []
    for ended in (range(0), range(1, 8)):
        cancellable.rows.update(ended)
        engine.reset_stats()
        first = engine.runner.run(batches, Sampling(30), None, cancellable)[0]
        moved.append(engine.stats.misses)
    assert first == engine.runner.run(batches, Sampling(30))[0]
    missing = sum(len(layer.nbytes) for layer in engine.model.expert_store.layers) - sum(
        slots for pools in engine.runner.resident.plan for _, slots in pools
    )
    assert moved[0] == 30 * missing
    assert moved[1] <= 2 * missing + 28 * 2 * 2  # the prompts and one step of all rows, then two layers of top 2


def test_rows_that_are_not_asked_for_want_no_experts(folder_of):
    engine = load_fast(folder_of(TEXT), "100%", rows=8)
    requests = []
    for rows in (3, 4):
        engine.reset_stats()
        engine.generate(CONVERSATIONS[:1] * rows, 6)
        requests.append(sum(layer.requests for layer in engine.stats.layers))
    assert requests == [5 * 2 * 2] * 2  # equal rows want equal experts, padding rows none


def test_device_bytes_are_what_was_granted(folder_of):
    for memory in ("25%", "60%"):
        engine = load_fast(folder_of(TEXT), memory)
        budget = engine.expert_bytes * int(memory[:-1]) // 100
        largest = max(max(layer.nbytes) for layer in engine.model.expert_store.layers)
        assert budget - largest < engine.device_expert_bytes <= budget


def test_steps_are_told_while_it_is_built(folder_of):
    told = []
    expertflow_quant.load(folder_of(TEXT), fast=True, on_step=told.append)
    assert told[0] == "placing experts"
