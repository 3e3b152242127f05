"""Batched GPTQ and AWQ, every width, group size and symmetry, against independent implementations in float64."""

import json

import pytest
from torch import Tensor
from typer.testing import CliRunner

from eval.__main__ import app
from eval.quantizers import cases, command
from eval.quantizers.cases import FORMATS, Case, awq_cases, gptq_cases
from expertflow_quant.formats import Format


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return cases.gptq_batch()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq(batch: tuple[Tensor, Tensor], format: Format, act_order: bool) -> None:
    for case in gptq_cases(batch, format, act_order):
        assert case.equal_codes is not None
        assert case.equal_codes > 0.98
        assert case.ours == pytest.approx(case.slow, rel=0.01)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_awq(format: Format) -> None:
    for case in awq_cases(format):
        assert case.ours == pytest.approx(case.slow, rel=0.01)
        assert case.ours == pytest.approx(case.as_run, rel=1e-3)


@pytest.mark.parametrize("ours", [1.005, 1.02])
def test_the_command_fails_where_errors_are_apart(ours, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "FORMATS", FORMATS[:1])
    monkeypatch.setattr(command, "gptq_cases", lambda batch, format, act_order: [Case(1.0, 1.0, equal_codes=0.99)])
    monkeypatch.setattr(command, "awq_cases", lambda format: [Case(1.0, 1.0), Case(ours, 1.0)])
    outcome = CliRunner().invoke(app, ["quantizers", "--out", str(tmp_path / "found.json")])
    assert outcome.exit_code == (ours > 1.01), outcome.output
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["largest_apart"] for row in rows] == pytest.approx([0, 0, ours - 1])
    assert [row["equal_codes"] for row in rows] == [0.99, 0.99, None]
