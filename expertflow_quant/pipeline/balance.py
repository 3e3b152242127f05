"""Expert-balanced choice of calibration samples: from a larger pool those that reach the experts others hardly reach.

After the idea of MoEQuant's balanced sampling (Hu et al. 2025, arXiv 2505.03804), with choice in place of generation:
the pool runs through the model once, every sample's tokens are counted at every expert, and samples are taken one
after the other, each the one that raises

    sum over experts of log(1 + tokens so far)

the most. The logarithm makes a token worth the more the fewer an expert has, so the least covered experts come first;
the sum is submodular and monotone, so the greedy choice reaches at least 1 - 1/e of the best (Nemhauser, Wolsey and
Fisher 1978).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.processor import load_processor
from expertflow_quant.pipeline.batches import CalibrationData, CalibrationSample
from expertflow_quant.pipeline.observe import Observations, ObserveOptions
from expertflow_quant.pipeline.stream import ModelStream


def balanced_samples(
    stream: ModelStream, pool: Sequence[CalibrationSample], wanted: int, device: torch.device | str = "cpu"
) -> list[CalibrationSample]:
    """``wanted`` of ``pool``, in the pool's order. Raises ExpertFlowError when the pool holds fewer."""
    if wanted > len(pool):
        raise ExpertFlowError(f"{wanted} samples cannot be chosen from a pool of {len(pool)}: enlarge the pool")
    data = CalibrationData.from_samples(load_processor(stream.folder), pool)
    counts = routed_counts(Observations(stream, data, ObserveOptions(min_tokens=0, text_share=None), device))
    return [pool[number] for number in sorted(choose_balanced(counts.flatten(1), wanted))]


def routed_counts(observations: Observations) -> Tensor:
    """int64 [samples, layers, experts]: the tokens of each sample that the router sends to each expert; 0 where a layer
    has fewer experts than another."""
    sample = _samples_of_tokens(observations.data)
    layers = observations.stream.layers
    most = max(layer.experts for layer in layers)
    found = torch.zeros(int(sample[-1]) + 1, len(layers), most, dtype=torch.int64)
    for observed in observations.layers():
        index = observed.index.cpu()
        if len(index) != len(sample):
            raise ExpertFlowError(
                f"layer {observed.layer.index} sees {len(index)} rows of {len(sample)} tokens, so samples cannot be "
                "told apart there: leave the pool out"
            )
        kept = index < observed.layer.experts  # some routers mark a token that no expert gets so
        places = (sample[:, None] * most + index)[kept]
        found[:, observed.layer.index] = places.bincount(minlength=found.shape[0] * most).view(-1, most)
    return found


def choose_balanced(counts: Tensor, wanted: int) -> list[int]:
    """The rows of ``counts`` [samples, experts] that are taken, in that order; ties go to the first."""
    reached, left = torch.zeros(counts.shape[1], dtype=torch.float64), torch.arange(len(counts))
    tokens = counts.double()
    taken: list[int] = []
    for _ in range(wanted):
        gains = (reached + tokens[left]).log1p().sum(1)
        best = int(gains.argmax())
        taken.append(int(left[best]))
        reached += tokens[left[best]]
        left = torch.cat([left[:best], left[best + 1 :]])
    return taken


def _samples_of_tokens(data: CalibrationData) -> Tensor:
    """int64 [T]: the sample of each token that is not padding, in the order in which layers see them."""
    found, first = [], 0
    for make in data.batches:
        batch = make()
        lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1).cpu()
        found.append(torch.arange(first, first + len(lengths)).repeat_interleave(lengths))
        first += len(lengths)
    return torch.cat(found)
