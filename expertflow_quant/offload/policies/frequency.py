"""How often each expert is used: counted as a run goes, forgetting slowly, or known from a recorded one."""

from collections.abc import Collection, Iterable, Sequence

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.policy import Key, Progress, Ranked, Scores

HALF_LIFE = 64.0


class UseRates:
    """Share of the last steps that used each expert: a use weighs half as much after ``half_life`` steps.

    A scan counts like any step: it adds the same to every expert. Starts from ``prior``, as if observed before.
    """

    def __init__(self, progress: Progress, half_life: float = HALF_LIFE, prior: Scores | None = None) -> None:
        if half_life <= 0:
            raise ExpertFlowError(f"half life of {half_life} steps: give one above zero")
        self._progress = progress
        self._keep = 0.5 ** (1 / half_life)
        self._rate = [list(row) for row in prior] if prior else [[0.0] * count for count in progress.experts]
        self._since = [[-1] * count for count in progress.experts]
        if [len(row) for row in self._rate] != list(progress.experts):
            raise ExpertFlowError(
                f"a prior for {[len(row) for row in self._rate]} experts by layer, the model has "
                f"{list(progress.experts)}: give the popularity of this model"
            )
        progress.watch(self._asked)

    def rate(self, key: Key) -> float:
        """0 to 1: what the last steps say of the chance that a step uses ``key``."""
        layer, expert = key
        age = self._progress.step - self._since[layer][expert]
        return self._rate[layer][expert] * self._keep**age

    def _asked(self, layer: int, experts: Collection[int]) -> None:
        for expert in experts:
            self._rate[layer][expert] = self.rate((layer, expert)) + 1 - self._keep
            self._since[layer][expert] = self._progress.step


class LFU(Ranked):
    """Least frequently used, with decay: an expert's count halves every ``half_life`` steps."""

    def __init__(self, progress: Progress, half_life: float = HALF_LIFE) -> None:
        super().__init__()
        self._rates = UseRates(progress, half_life)

    def rank(self, key: Key) -> float:
        return self._rates.rate(key)


class Popular(Ranked):
    """Static popularity: keeps the experts that a recorded run used most, whatever is used now."""

    candidates = None

    def __init__(self, popularity: Scores) -> None:
        super().__init__()
        self._popularity = popularity

    def rank(self, key: Key) -> float:
        layer, expert = key
        return self._popularity[layer][expert]


def popularity(requests: Iterable[Sequence[Collection[int]]], experts: Sequence[int]) -> list[list[float]]:
    """Share of the steps that used each expert, ``[layers][experts]``; a step is its layers' distinct experts."""
    counts = [[0] * count for count in experts]
    steps = 0
    for step in requests:
        steps += 1
        for layer, wanted in enumerate(step):
            for expert in wanted:
                counts[layer][expert] += 1
    return [[count / max(steps, 1) for count in row] for row in counts]
