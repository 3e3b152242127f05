"""What a peer is given is the expert and its tokens; ours are measured alike; who is above whom."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from eval.__main__ import app
from eval.peers.compare import CASES, SORTED, Case, compare, summary
from eval.peers.experts import Expert, write_llama


@pytest.fixture(scope="module")
def expert():
    draw = torch.Generator().manual_seed(0)

    def exact(*size):
        return torch.randn(*size, generator=draw).half().float()

    rows = exact(512, 64)
    rows = (rows / rows.square().mean(-1, keepdim=True).sqrt()).half().float()
    return Expert("one", exact(32, 64) / 8, exact(32, 64) / 8, exact(64, 32) / 4, rows[:256], rows[256:])


def test_the_llama_s_mlp_gets_the_samples_and_answers_like_the_expert(expert, tmp_path):
    write_llama(expert, tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    seen = {}
    mlp.register_forward_hook(lambda module, args, out: seen.update(given=args[0], answer=out))
    model(input_ids=torch.arange(128, 256)[None])
    torch.testing.assert_close(seen["given"][0], expert.samples[128:], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(seen["answer"][0], expert.output(expert.samples[128:]), rtol=1e-2, atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == 256


def test_errors_are_relative_and_the_norm_is_undone(expert):
    norm = torch.rand(64) + 0.5
    same = expert.errors(norm, expert.gate / norm, expert.up / norm, expert.down)
    assert max(same.values()) < 1e-5
    assert expert.errors(torch.ones(64), expert.gate, expert.up, 1.1 * expert.down)["unseen"] == pytest.approx(0.1)


def test_our_errors_order_as_bits_do(expert, tmp_path):
    cases = [Case(f"{method} {form}", method, form, SORTED) for method in ("gptq", "awq") for form in FORMATS]
    found = compare([expert], {}, tmp_path, lambda text: None, cases)
    for method in range(2):
        errors = [entry["errors"]["ours"]["samples"] for entry in found[3 * method : 3 * method + 3]]
        assert errors == sorted(errors)
        assert 0 < errors[0] < 0.02


FORMATS = ("int8-g32", "int4-g32", "int3-g32")


def test_a_summary_says_who_is_above_whom():
    pairs = ([("ours", 0.1), ("peer", 0.1)], [("ours", 0.3), ("peer", 0.28)])
    errors = [{who: {"samples": error, "unseen": 2 * error} for who, error in pair} for pair in pairs]
    entries = [{"case": "a", "format": "int4-g32", "alike": True, "errors": each} for each in errors]
    (row,) = summary(entries)
    assert row["samples"]["error"] == {"ours": pytest.approx(0.2), "peer": pytest.approx(0.19)}
    assert row["unseen"]["above"]["peer"] == pytest.approx(0.2 / 0.19 - 1)
    assert row["passed"] is False
    assert summary(entries[:1])[0]["passed"] is True
    assert summary([{**entry, "alike": False} for entry in entries])[0]["passed"] is None


def test_every_case_is_for_somebody_and_a_missing_package_is_named(tmp_path):
    assert all(case.peers for case in CASES)
    out = tmp_path / "peers.json"
    run = CliRunner().invoke(app, ["peers", str(tmp_path), "--gptqmodel", sys.executable, "--out", str(out)])
    assert run.exit_code == 1
    assert "has no gptqmodel" in run.output
    run = CliRunner().invoke(app, ["peers", str(tmp_path), "--out", str(out)])
    assert "nobody to compare with" in run.output
    assert not Path(out).exists()
