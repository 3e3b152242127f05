"""What the engine asks of whatever runs the model: prompts in, generated tokens out."""

from collections.abc import Sequence
from typing import Protocol

from expertflow_quant.offload.stats import CacheStats
from expertflow_quant.runtime.answers import Sampling
from expertflow_quant.runtime.prompts import Prompts
from expertflow_quant.runtime.stream import Cancellable, TokenQueue


class Runner(Protocol):
    """One way of running a model. One call at a time."""

    @property
    def max_rows(self) -> int | None:
        """Most prompts in one call; None for no limit."""
        ...

    @property
    def prefill_tokens(self) -> int | None:
        """Most tokens, padding included, in one batch of prompts of several rows; None for no limit."""
        ...

    @property
    def room(self) -> int | None:
        """Most tokens, prompt and answer together, that a row has room for; None for no limit of its own."""
        ...

    @property
    def stats(self) -> CacheStats: ...
    def reset_stats(self) -> None: ...
    @property
    def expert_bytes(self) -> int: ...
    @property
    def device_expert_bytes(self) -> int: ...

    def run(
        self,
        batches: Sequence[Prompts],
        sampling: Sampling,
        streamer: TokenQueue | None = None,
        cancellable: Cancellable | None = None,
    ) -> list[list[int]]:
        """Generated tokens of every prompt, in the batches' order; a row may go on with padding after its end.

        ``streamer`` is told the prompt and then each token, for a single prompt; ``cancellable`` ends it early.
        """
        ...
