"""The verdict's error rates in simulation: seeded, small; the published ones are in eval/results/verdict.json."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.verdict.rates import BINARY, KINDS, PARTIAL, Setting, draw_differences, pass_rates, settings, summary

FOUR = {kind: Setting("four", 320, 4, kind, 0.02, 0.12, -0.02) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_studies_have_the_truth_discordance_and_correlation_that_they_say(kind):
    differences = draw_differences(FOUR[kind], 400, np.random.default_rng(0)).reshape(-1, 4)
    assert differences.mean() == pytest.approx(-0.02, abs=0.002)
    assert np.abs(differences).mean() == pytest.approx(0.12, abs=0.003)
    assert -1 <= differences.min() < 0 < differences.max() <= 1
    correlations = np.corrcoef(differences.T)[np.triu_indices(4, 1)]
    assert correlations.mean() == pytest.approx(0.3, abs=0.02)
    assert (set(np.unique(differences)) == {-1.0, 0.0, 1.0}) == (kind == BINARY)


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_pass_falsely_at_the_margin_and_twice_as_many_by_naive_errors(kind):
    rates = pass_rates(FOUR[kind], 1500, resamples=400)
    assert 0.035 <= rates.verdict <= 0.07  # 4 to 6.5 % and what 1500 studies scatter
    assert 0.04 <= rates.clustered <= 0.075
    assert 0.095 <= rates.naive <= 0.15
    assert rates.error == pytest.approx(0.0056, abs=0.001)


def test_pages_of_two_questions_and_true_equality():
    charts = pass_rates(Setting("two", 625, 2, BINARY, 0.02, 0.12, -0.02), 1000, resamples=400)
    assert 0.03 <= charts.verdict <= 0.07
    assert 0.055 <= charts.naive <= 0.105
    equal = pass_rates(Setting("power", 1250, 2, BINARY, 0.02, 0.06, 0.0), 200, resamples=400)
    assert equal.verdict >= 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [5, 20])
def test_few_images_never_pass_often(kind, images):
    """Plain errors of few images pass at ten times the nominal rate, because what is rare was not seen."""
    rates = pass_rates(Setting("few", images, 4, kind, 0.02, 0.06, -0.02), 500, resamples=400)
    assert rates.verdict <= 0.05 < 0.1 <= rates.clustered


def test_losses_without_any_gain_do_not_slip_through():
    rates = pass_rates(Setting("losses", 160, 4, BINARY, 0.02, 0.02, -0.02), 500, resamples=400)
    assert rates.verdict <= 0.07 < rates.clustered


def test_settings_cover_both_margins_and_the_public_sizes():
    found = settings()
    assert {s.margin for s in found} == {0.01, 0.02}
    assert {(s.images, s.per_image) for s in found} >= {(1250, 2), (1337, 4), (10, 4)}
    assert {s.kind for s in found} == {BINARY, PARTIAL}
    assert all(s.truth in (-s.margin, 0.0) for s in found)


def test_the_command_writes_shares_summary_and_plot(tmp_path):
    out = tmp_path / "verdict.json"
    arguments = ["calibrate-verdict", "--out", str(out), "--studies", "100", "--resamples", "200", "--group"]
    assert CliRunner().invoke(app, [*arguments, "losses only"]).exit_code == 0
    written = json.loads(out.read_text())
    assert len(written["settings"]) == 4
    assert written["summary"]["ranges"]["losses only"]["verdict"][1] <= 0.12
    assert out.with_suffix(".png").stat().st_size > 5000
    refused = CliRunner().invoke(app, [*arguments, "poems"], env={"COLUMNS": "300"})
    assert refused.exit_code == 1
    assert "use one of four questions an image" in refused.output


def test_summary_says_whether_the_main_group_is_within_bounds():
    good = pass_rates(Setting("four questions an image", 320, 4, BINARY, 0.02, 0.12, -0.02), 500, resamples=300)
    assert summary([good])["ranges"]["four questions an image"]["verdict"] == [good.verdict] * 2
    always = pass_rates(Setting("four questions an image", 320, 4, BINARY, 0.02, 0.12, 0.1), 100, resamples=200)
    assert summary([good, always])["within_4_to_6.5_percent"] is False
