"""Who waits for whom in a step that looks ahead on a GPU, told by streams that only write it down."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers.fast import load_fast, rebuilt

from expertflow_quant.offload import fill
from expertflow_quant.offload.resident import ResidentExperts
from expertflow_quant.runtime.fast.build import FastOptions
from expertflow_quant.runtime.fast.lookahead import LookAhead, Streams

ONE = torch.zeros(1, 2, dtype=torch.int64)


class Stream:
    """A line of ``log`` for everything that happens on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name}: after {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name}: after {event}")

    def record_event(self):
        self.log.append(f"{self.name}: event")
        return f"the event of {self.name}"


@pytest.fixture
def streams(monkeypatch):
    """The log, and the side streams of two fills at once; the cache's calls are logged with the stream they are on."""
    log = []
    now = [Stream("main", log)]

    @contextlib.contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    def logged(name):
        call = getattr(ResidentExperts, name)

        def wrapped(self, layer, *args, **named):
            log.append(f"{now[-1].name}: {name} {layer}")
            return call(self, layer, *args, **named)

        monkeypatch.setattr(ResidentExperts, name, wrapped)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, on: log.append(f"{on.name}: keeps hidden states"))
    for name in ("choose", "resolve", "fill"):
        logged(name)

    def filled(todo, ahead=0):
        log[-1] += f", one of {ahead}" if ahead else ""

    monkeypatch.setattr(fill, "fill", filled)
    return log, Streams(Stream("choosing", log), (Stream("fill 0", log), Stream("fill 1", log)))


def stepped(folder_of, streams, distance, guessed, memory="60%", foretold=None):
    """The log of a step that looks ``distance`` layers ahead, with guesses for the layers ``guessed``."""
    log, side = streams
    engine = load_fast(folder_of("qwen3_moe"), memory, rows=1)
    ahead = LookAhead(lambda layer, hidden: ONE if layer in guessed else None, distance, engine.device, foretold)
    runner = rebuilt(engine, memory, FastOptions(rows=1, room=160), make_ahead=lambda *_: ahead)
    runner.graphs.active[:1] = True
    ahead.streams = side
    log.clear()
    with torch.inference_mode():
        runner.graphs.step(1)
    return log


def ahead_of(layer):
    """What is done for a layer's guess: choosing, then filling."""
    filling = f"fill {layer % 2}"
    choosing = [f"choosing: choose {layer}", f"choosing: resolve {layer}"]
    return choosing, [f"{filling}: after choosing", f"{filling}: fill {layer}, one of 2", f"{filling}: event"]


def routed(layer, guessed=True):
    after = [f"main: after the event of fill {layer % 2}"] if guessed else []
    return [*after, f"main: resolve {layer}", f"main: fill {layer}"]


def test_records_of_two_layers_arrive_at_once_and_each_layer_waits_for_its_own(folder_of, streams):
    log = stepped(folder_of, streams, 2, guessed=(0, 1))
    begun = [line for layer in (0, 1) for part in (["choosing: after main"], *ahead_of(layer)) for line in part]
    assert log[: len(begun)] == begun
    after = len(begun)
    assert log[after : after + 6] == [*routed(0), *routed(1)]
    assert sorted(log[after + 6 :]) == ["main: after choosing", "main: after fill 0", "main: after fill 1"]


def test_a_predictor_guesses_before_slots_are_chosen(folder_of, streams):
    log, _ = streams
    foretold = SimpleNamespace(begin=lambda tokens, active: log.append(f"{torch.cuda.current_stream().name}: guess"))
    stepped(folder_of, streams, 2, (1,), foretold=foretold)
    assert log[:2] == ["choosing: after main", "choosing: guess"]
    assert log.index("choosing: choose 1") > 1
    assert log.count("choosing: guess") == 1


def test_hidden_states_are_kept_until_the_guess_from_them_is_made(folder_of, streams):
    log = stepped(folder_of, streams, 1, guessed=(0, 1))
    (choose_0, fill_0), (choose_1, fill_1) = ahead_of(0), ahead_of(1)
    begun = ["choosing: after main", *choose_0, *fill_0]
    first = ["choosing: after main", *choose_1, "choosing: keeps hidden states", *fill_1, *routed(0)]
    assert log[:-3] == [*begun, *first, *routed(1)]
    assert sorted(log[-3:]) == ["main: after choosing", "main: after fill 0", "main: after fill 1"]


@pytest.mark.parametrize("guessed", [(), (1,)])
def test_a_layer_that_was_not_guessed_is_not_waited_for(guessed, folder_of, streams):
    log = stepped(folder_of, streams, 2, guessed)
    lines = [line for layer in (0, 1) for line in routed(layer, layer in guessed)]
    assert [line for line in log if line in lines] == lines
    assert not any("after the event" in line for line in log if line not in lines)
    # a capture breaks where it waits for a stream that is not in it
    joined = ["main: after choosing", *(f"main: after fill {layer}" for layer in guessed)]
    assert sorted(log[-len(joined) :]) == joined


def test_nothing_is_guessed_where_all_are_resident(folder_of, streams):
    assert not any("choosing" in line or "fill 0:" in line for line in stepped(folder_of, streams, 2, (0, 1), "100%"))


def test_as_many_layers_arrive_at_once_as_guesses_reach(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("", []))
    for distance, fills in ((1, 1), (2, 2), (8, 2)):
        streams = LookAhead(lambda layer, hidden: None, distance, torch.device("cuda")).streams
        assert len({streams.choosing, *streams.filling}) == 1 + len(streams.filling) == 1 + fills
