"""How the next token is chosen from logits, on the device."""

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from expertflow_quant.runtime.answers import Sampling


class Sampler:
    """Greedy at temperature 0; else draws, from ``sampling.seed`` if there is one, with transformers' own warpers."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self._generator: torch.Generator | None = None
        if self.greedy:
            return
        self._warpers = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> Tensor:
        """Token ids int64 ``[rows]`` from logits ``[rows, vocabulary]``."""
        if self.greedy:
            return logits.argmax(dim=-1)
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)[:, 0]
