"""Chosen samples reach the experts that others hardly reach; what is counted is what the layers see."""

from pathlib import Path

import pytest
import torch
from helpers import tiny

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.pipeline.balance import balanced_samples, choose_balanced, routed_counts
from expertflow_quant.pipeline.batches import CalibrationData
from expertflow_quant.pipeline.observe import Observations, ObserveOptions
from expertflow_quant.pipeline.stream import ModelStream

RAW = ObserveOptions(min_tokens=0, text_share=None)


def worth(counts: torch.Tensor, taken: list[int]) -> float:
    return float(counts[taken].sum(0).double().log1p().sum())


def test_every_step_takes_the_best_sample_there_is() -> None:
    counts = torch.randint(0, 20, (12, 5), generator=torch.Generator().manual_seed(0))
    counts[:, 4] = 0
    counts[7, 4] = 1
    taken = choose_balanced(counts, 4)
    for step in range(4):
        before = taken[:step]
        others = [number for number in range(12) if number not in before]
        assert worth(counts, taken[: step + 1]) == max(worth(counts, [*before, other]) for other in others)


def test_the_only_sample_that_reaches_an_expert_is_taken() -> None:
    counts = torch.full((50, 8), 10)
    counts[:, 3] = 0
    counts[41, 3] = 5
    assert choose_balanced(counts, 1) == [41]
    assert sorted(choose_balanced(counts, 50)) == list(range(50))


def test_counts_are_those_of_each_sample_alone(tmp_path: Path) -> None:
    tiny.tiny_model("qwen3_moe").save_pretrained(tmp_path)
    batches = [tiny.model_inputs("qwen3_moe", rows=2, seed=1), tiny.model_inputs("qwen3_moe", rows=1, seed=2)]
    batches[0]["attention_mask"][1, -3:] = 0
    stream = ModelStream(tmp_path)
    counts = routed_counts(Observations(stream, CalibrationData.from_batches(batches), RAW))
    rows = [
        {name: part[row : row + 1] for name, part in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]
    for number, row in enumerate(rows):
        alone = Observations(stream, CalibrationData.from_batches([row]), RAW)
        assert counts[number].tolist() == [observed.counts for observed in alone.layers()]


def test_a_pool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    tiny.tiny_model("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(ExpertFlowError, match="3 samples cannot be chosen from a pool of 2"):
        balanced_samples(ModelStream(tmp_path), [{"messages": []}] * 2, 3)
