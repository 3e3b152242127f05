"""Training of the path predictor: it learns what can be learned, the same again from one seed, and refuses the rest."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from calibration.__main__ import app
from calibration.predictor.commands import check_same, fit_basis, read_basis
from calibration.predictor.train import Settings, examples, path_loss, rate_share, recalls_of, train
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.predictor import best
from expertflow_quant.offload.sight import Basis, Sight, coded, sight_path
from expertflow_quant.offload.trace import GENERATED, PROMPT_IMAGE, RoutingTrace

LAYERS, EXPERTS, IDS = 2, 8, 12
QUICK = Settings(
    width=16, inner=32, heads=2, encoder_layers=1, decoder_layers=1, steps=150, batch=8, warmup=10, rate=1e-2
)


def by_token(seed=0, items=30, task="charts"):
    """Routes that the token's id decides; images' (id 0) are decided by their picture alone."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [0, 1, 1, 0, 2, 2] * items
    ids = torch.randint(1, IDS, (len(kinds),), generator=generator)
    ids[torch.tensor(kinds) == PROMPT_IMAGE] = 0
    shown = torch.randint(0, 2, (len(kinds),), generator=generator) * (ids == 0)
    table = torch.rand(IDS + 1, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(99)).argsort(-1)[..., :2]
    experts = table[torch.where(shown == 1, IDS, ids)]
    numbers = [item for item in range(items) for _ in range(6)]
    trace = RoutingTrace.of(ids, kinds, numbers, experts, EXPERTS, [task] * items)
    pictures = (shown[trace.kind == PROMPT_IMAGE] * 2 - 1).float().unsqueeze(1)
    return trace, Sight(trace.token_ids, EXPERTS, None, coded(pictures), Basis(torch.zeros(3), torch.ones(3, 1)))


def test_routes_that_tokens_decide_are_learned_and_pictures_only_when_seen():
    trace, sight = by_token()
    held, held_sight = by_token(seed=1, items=6)
    images = held.kind == PROMPT_IMAGE
    found = {}
    for name, own in (("ids", None), ("pictures", sight)):
        trained = train([(trace, own)], QUICK)
        hits = best(trained.predictor.scores_for(held, held_sight), 2) & held.paths()
        found[name] = hits.sum(-1).float() / 2
        assert found[name][~images].mean() > 0.9
    assert found["pictures"][images].mean() > 0.95
    assert found["ids"][images].mean() < 0.9
    assert trained.recall > 0.9
    assert trained.items == (27, 3)


def test_the_same_seed_trains_the_same_predictor():
    trace, _ = by_token(items=10)
    quick = Settings(width=8, inner=8, heads=2, encoder_layers=1, decoder_layers=1, steps=5, batch=4)
    one, two = (train([(trace, None)], quick).predictor.scores_for(trace) for _ in range(2))
    assert torch.equal(one, two)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), loss=st.sampled_from(["bce", "softmax"]), weighted=st.booleans())
def test_losses_against_plain_sums(seed, loss, weighted):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, LAYERS, EXPERTS, generator=generator)
    paths = torch.zeros(3, LAYERS, EXPERTS, dtype=torch.bool)
    paths.scatter_(2, torch.rand(3, LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :2], True)
    weight = torch.rand(3, generator=generator) + 0.1
    total, counts = 0.0, weight.tolist() if weighted else [1.0] * 3
    for token in range(3):
        for layer in range(LAYERS):
            values = logits[token, layer].double()
            if loss == "bce":
                chance = 1 / (1 + (-values).exp())
                each = [-(chance[e] if paths[token, layer, e] else 1 - chance[e]).log() for e in range(EXPERTS)]
                total += counts[token] * float(sum(each)) / EXPERTS
            else:
                shares = values.exp() / values.exp().sum()
                total += (
                    counts[token] * float(-sum(shares[e].log() for e in range(EXPERTS) if paths[token, layer, e])) / 2
                )
    found = path_loss(logits, paths, loss, weight if weighted else None)
    assert float(found) == pytest.approx(total / (sum(counts) * LAYERS), rel=1e-4)


def test_what_counts_more_is_learned_better():
    """A network too small for all tokens spends itself on those that count."""
    trace, _ = by_token(items=40)
    held, _ = by_token(seed=1, items=20)
    recalls = []
    for generated in (0.02, 50.0):
        trained = train([(trace, None)], replace(QUICK, width=4, heads=2, steps=120, generated=generated))
        hits = (best(trained.predictor.scores_for(held), 2) & held.paths()).float().sum(-1).mean(-1) / 2
        recalls.append(float(hits[held.kind == GENERATED].mean()))
        assert trained.generated_recall == pytest.approx(recalls[-1], abs=0.25)
        assert trained.predictor.trained["generated"] == generated
    assert recalls[1] > recalls[0] + 0.1


def test_recalls_are_counted_over_all_and_over_generated_tokens():
    trace, _ = by_token(items=10)
    trained = train([(trace, None)], replace(QUICK, steps=20))
    predictor = trained.predictor
    hits = (best(predictor.scores_for(trace), 2) & trace.paths()).sum(-1).double() / 2
    everything, generated = recalls_of(predictor, examples([(trace, None)], False), 2)
    assert everything == pytest.approx(float(hits.mean()))
    assert generated == pytest.approx(float(hits[trace.kind == GENERATED].mean()))


def test_rate_rises_then_falls():
    plan = Settings(warmup=10, steps=100)
    shares = [rate_share(step, plan) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == pytest.approx(0.91)
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] <= 0.02


def test_basis_gives_uncorrelated_values_of_unit_variance():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    seen = fit_basis(values, 4)(values).double()
    assert torch.allclose(seen.T @ seen / len(seen), torch.eye(4, dtype=torch.float64), atol=1e-3)
    with pytest.raises(ExpertFlowError, match="cannot give 9 directions"):
        fit_basis(values, 9)


def test_command_trains_from_files_into_a_folder(tmp_path):
    trace, sight = by_token(items=20)
    trace.save(tmp_path / "routes.safetensors")
    sight.save(sight_path(tmp_path / "routes.safetensors"))
    options = [
        "--steps",
        "3",
        "--batch",
        "2",
        "--width",
        "8",
        "--inner",
        "8",
        "--generated",
        "7",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(
        app, ["predictor", str(tmp_path / "routes.safetensors"), *options], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    predictor = PathPredictor.load(tmp_path / "out")
    assert predictor.trained["tasks"] == ["charts"]
    assert predictor.trained["steps"] == 3
    assert predictor.trained["generated"] == 7
    assert "generated tokens" in done.output
    assert torch.equal(read_basis(tmp_path / "out").basis, sight.basis.basis)
    done = CliRunner().invoke(app, ["predictor", str(tmp_path / "absent.safetensors"), *options])
    assert done.exit_code == 1
    assert "absent.safetensors" in done.output


def test_what_cannot_be_trained_on_is_refused():
    trace, sight = by_token(items=4)
    other = Sight(trace.token_ids, EXPERTS, None, sight.codes, Basis(torch.zeros(3), torch.zeros(3, 1)))
    with pytest.raises(ExpertFlowError, match="different bases"):
        train([(trace, sight), (trace, other)], QUICK)
    with pytest.raises(ExpertFlowError, match="cannot be split"):
        train([(trace, sight)], QUICK)
    wider = RoutingTrace.of(trace.token_ids, trace.kind, trace.item, trace.experts.long(), EXPERTS + 1, trace.tasks)
    with pytest.raises(ExpertFlowError, match="several models"):
        train([(trace, None), (wider, None)], QUICK)
    with pytest.raises(ExpertFlowError, match=r"counting 0\.0 times"):
        Settings(generated=0.0)
    with pytest.raises(ExpertFlowError, match="loss 'hinge'"):
        Settings(loss="hinge")
    with pytest.raises(ExpertFlowError, match="not those of the trace"):
        check_same(trace, by_token(seed=3, items=4)[0])
