"""A pass belongs to its thread, and attention belongs to a pass."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.fast import CONVERSATIONS, load_fast

from expertflow_quant import ExpertFlowError
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.fast.attention import IGNORED, NAME, PassThrough, attention_forward


class Recording:
    """Answers attention with the values, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def attention(self, layer, q, k, v, options):
        self.asked.append((layer, options))
        return v.transpose(1, 2)


MODULE = SimpleNamespace(layer_idx=3)
Q, K, V = torch.randn(3, 1, 2, 4, 16)


def test_a_gpu_is_the_current_one_while_an_answer_is_made(folder_of, monkeypatch):
    entered, seen = [], []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    with passes.on_device(torch.device("cpu")):
        assert not entered
    with passes.on_device(torch.device("cuda:1")):
        assert entered == [torch.device("cuda:1")]
    engine = load_fast(folder_of("qwen3_moe"), "50%")
    monkeypatch.setattr(passes, "on_device", device)
    for owner, name in ((engine.runner, "prefill"), (engine.runner.graphs, "step")):
        ours = getattr(owner, name)
        spied = lambda *given, ours=ours: (seen.append(list(entered)), ours(*given))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, spied)
    list(engine.stream(CONVERSATIONS[0], 3))
    assert seen == [[engine.device]] * 3
    assert not entered


def test_a_pass_is_there_for_its_thread_while_it_runs():
    the_pass, seen = Recording(), []
    assert passes.current() is None
    with passes.running(the_pass):
        assert passes.current() is the_pass
        thread = threading.Thread(target=lambda: seen.append(passes.current()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert passes.current() is None


def test_two_threads_have_a_pass_each():
    both, seen = threading.Barrier(2), {}

    def work(name):
        with passes.running(name):
            both.wait(10)
            seen[name] = passes.current()
            both.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"one": "one", "other": "other"}


def test_a_pass_within_a_pass_gives_way_again_and_so_does_one_that_fails():
    def fail():
        with passes.running("inner"):
            assert passes.current() == "inner"
            raise OSError("broken")

    with passes.running("outer"):
        with pytest.raises(OSError, match="broken"):
            fail()
        assert passes.current() == "outer"
    assert passes.current() is None


def test_nothing_in_a_pass_is_recorded_for_gradients():
    with passes.running(Recording()):
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def test_attention_is_the_pass_s():
    the_pass = Recording()
    with passes.running(the_pass):
        out, weights = attention_forward(MODULE, Q, K, V, None)
        attention_forward(MODULE, Q, K, V, None, scaling=0.5, sliding_window=7, s_aux=torch.ones(2))
    assert torch.equal(out, V.transpose(1, 2))
    assert weights is None
    (layer, first), (_, second) = the_pass.asked
    assert (layer, first.scaling, first.window, first.sinks) == (3, 16**-0.5, None, None)
    assert (second.scaling, second.window, second.sinks.tolist()) == (0.5, 7, [1, 1])


def test_attention_outside_a_pass_is_refused():
    with pytest.raises(ExpertFlowError, match=r"SimpleNamespace asks .* a pass outside the engine.*fast=False"):
        attention_forward(MODULE, Q, K, V, None)


def test_a_mask_is_refused():
    with passes.running(Recording()), pytest.raises(ExpertFlowError, match="a mask of its own"):
        attention_forward(MODULE, Q, K, V, torch.zeros(1, 1, 4, 4))


def test_unknown_arguments_are_refused_by_name():
    with passes.running(Recording()), pytest.raises(ExpertFlowError, match="for softcap, position_bias, which"):
        attention_forward(MODULE, Q, K, V, None, softcap=30.0, position_bias=Q, dropout=0.0, other=None, flag=False)


def test_arguments_that_say_nothing_are_ignored():
    the_pass = Recording()
    with passes.running(the_pass):
        attention_forward(MODULE, Q, K, V, None, **dict.fromkeys(IGNORED, 1))
    assert len(the_pass.asked) == 1


def test_the_name_is_known_to_transformers():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS[NAME] is attention_forward


def test_the_cache_keeps_nothing():
    cache = PassThrough()
    keys, values = cache.update(K, V, 0, {"cache_position": None})
    assert keys is K
    assert values is V
    assert (cache.get_seq_length(), len(cache)) == (0, 0)
