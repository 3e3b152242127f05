"""Padding and ended rows want no experts; what is read stays as it was."""

import shutil

import pytest
import torch
from helpers import tiny

import expertflow_quant
from expertflow_quant.runtime.experts import NAME, attached
from expertflow_quant.runtime.stream import Cancellable
from expertflow_quant.runtime.waited import Waited, waited_for

ASKED = [[{"role": "user", "content": text}] for text in ("What is a router?", "Two?", "A third, longer question")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("waited")
    tiny.write_checkpoint(tiny.tiny_model("qwen3_moe"), root / "out", lambda layer, expert: "int4-g16")
    tiny.save_processor("qwen3_moe", root / "processor")
    for file in (root / "processor").iterdir():
        shutil.copy(file, root / "out")
    return expertflow_quant.load(root / "out", fast=False, context=128, dtype=torch.float32)


def routes(engine, run):
    """(layer, token ids of the pass, routed ids [T, K]) of every call of an experts module while ``run`` runs."""
    found, ids = [], []
    hooks = [
        engine.model.register_forward_pre_hook(
            lambda module, args, named: ids.append(named["input_ids"].clone()), with_kwargs=True
        )
    ]
    for module in attached(engine.model):
        layer = getattr(module, NAME).layer
        hooks.append(
            module.register_forward_pre_hook(
                lambda module, args, layer=layer: found.append((layer, ids[-1], args[1].clone()))
            )
        )
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_experts_are_asked_for_by_what_is_waited_for_alone(engine):
    texts = [engine.generate([one], 12)[0].text for one in ASKED]
    for stop in (text[at : at + 2] for text in texts for at in range(0, len(text), 2)):
        wanted = [engine.generate([one], 12, stop=(stop,))[0] for one in ASKED]
        lengths = [one.completion_tokens for one in wanted]
        if min(lengths) + 3 < max(lengths):
            break
    else:
        pytest.fail(f"no text ends one of {texts} early")

    engine.reset_stats()
    answers = []
    calls = routes(engine, lambda: answers.extend(engine.generate(ASKED, 12, stop=(stop,))))
    assert [one.token_ids for one in answers] == [one.token_ids for one in wanted]

    width, asked, everything = calls[0][1].shape[1], 0, 0
    for place, (_, _, routed) in enumerate(calls):
        step = place // len(attached(engine.model))
        if step == 0:
            real = torch.cat([torch.arange(width) >= width - one.prompt_tokens for one in wanted])
        else:
            real = torch.tensor([length > step for length in lengths])
        asked += len(routed[real].unique())
        everything += len(routed.unique())
    assert engine.stats.hits + engine.stats.misses == asked < everything
    assert waited_for(len(ASKED)) is None


def test_rows_end_by_their_tokens_and_by_what_else_ends_them():
    cancellable = Cancellable()
    waited = Waited([cancellable], [7], torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]))
    ids = torch.zeros(3, 4, dtype=torch.int64)
    with waited.watching():
        assert waited_for(9).tolist() == [False, False, True, True, True, True, False, True, True]
        assert waited_for(3) is None
        assert not waited(ids, None).any()
        assert waited_for(3).tolist() == [True] * 3
        ids[1, -1] = 7
        assert not waited(ids, None).any()  # transformers' own criterion says that
        assert waited_for(3).tolist() == [True, False, True]
        cancellable.rows.add(0)
        assert waited(torch.zeros(3, 5, dtype=torch.int64), None).tolist() == [True, False, False]
        assert waited_for(3).tolist() == [False, False, True]
        with Waited([], [], torch.ones(1, 2)).watching():
            assert waited_for(2).tolist() == [True, True]
        assert waited_for(3).tolist() == [False, False, True]
    assert waited_for(9) is None
