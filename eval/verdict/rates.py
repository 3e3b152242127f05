"""How often the verdict errs: studies drawn where the truth is known, judged by ``paired_difference`` itself.

A study is a number of images with some questions each. Every question of an image takes the image's own draw with
probability sqrt(correlation), else a fresh one, so that two questions of one image correlate by ``correlation``. A draw
says whether the system loses the question, wins it or neither; a loss is a whole point for scores of 0 and 1, and for
those like ANLS a whole point in two of five cases and else 0.02, 0.04 ... or 0.5. At a true difference of minus the
margin, every study that passes passes falsely: 5 % should.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.stats import CONFIDENCE, MARGIN_DENSE, MARGIN_OWN, PASSED, clustered_error, paired_difference

BINARY, PARTIAL = "0 or 1", "like ANLS"
KINDS = (BINARY, PARTIAL)
NOMINAL, LOWEST, HIGHEST = 1 - CONFIDENCE, 0.04, 0.065
_Z = 1.645
_WHOLE, _LEAST, _MOST = 0.4, 0.02, 0.5
_MEAN_LOSS = {BINARY: 1.0, PARTIAL: _WHOLE + (1 - _WHOLE) * (_LEAST + _MOST) / 2}
_STEPS = round(_MOST / _LEAST)
_CHUNK = 500


@dataclass(frozen=True)
class Setting:
    """Studies of one kind. ``discordance``: share of the questions that differ, weighed by how much; ``truth``: the
    mean difference that they are drawn from."""

    group: str
    images: int
    per_image: int
    kind: str
    margin: float
    discordance: float
    truth: float
    correlation: float = 0.3


@dataclass(frozen=True)
class Rates:
    """Shares of the studies that passed: by the verdict, by the clustered standard error alone, and by that of
    independent questions; ``error`` is the standard error of ``verdict`` as a share of finitely many studies."""

    setting: Setting
    studies: int
    verdict: float
    clustered: float
    naive: float

    @property
    def error(self) -> float:
        return math.sqrt(max(self.verdict * (1 - self.verdict), 1 / self.studies) / self.studies)

    def to_json(self) -> dict[str, Any]:
        """Everything, flat; shares with five decimals."""
        shares = {name: round(getattr(self, name), 5) for name in ("verdict", "clustered", "naive", "error")}
        return asdict(self.setting) | {"studies": self.studies} | shares


def settings() -> list[Setting]:
    """What is asked: the sizes of the public sets and of small runs, at both margins."""
    found = []
    against = ((MARGIN_OWN, 0.04), (MARGIN_DENSE, 0.12))
    for kind in KINDS:
        for margin, discordance in against:
            at = (kind, margin, discordance)
            found += [Setting("four questions an image", n // 4, 4, *at, -margin) for n in (1280, 2500, 5348)]
            found.append(Setting("two questions an image", 1250, 2, *at, -margin))
            found.append(Setting("no correlation", 320, 4, *at, -margin, correlation=0.0))
            found += [Setting("few images", k, 4, *at, -margin) for k in (10, 20, 40, 80, 160)]
            found.append(Setting("losses only", 320, 4, kind, margin, margin, -margin))
            found.append(Setting("power", 1250, 2, *at, 0.0))
            found.append(Setting("power", 1337, 4, *at, 0.0))
    return found


def pass_rates(
    setting: Setting, studies: int, resamples: int = 1000, seed: int = 0, done: Callable[[int], None] | None = None
) -> Rates:
    """Judge ``studies`` drawn studies; ``done`` is told of every few that are."""
    whom = (setting.images, setting.per_image, KINDS.index(setting.kind), round(1000 * setting.margin))
    rng = np.random.default_rng([seed, *whom])
    images = np.repeat(np.arange(setting.images), setting.per_image)
    passed = np.zeros(3)
    for differences in _studies(setting, studies, rng):
        for index, study in enumerate(differences):
            result = paired_difference(study, np.zeros_like(study), images, resamples=resamples, seed=index)
            bounds = plain_bounds(study, setting.per_image)
            passed += (result.verdict(setting.margin) in PASSED, *(bound > -setting.margin for bound in bounds))
        if done:
            done(len(differences))
    return Rates(setting, studies, *(float(share) for share in passed / studies))


def plain_bounds(differences: NDArray[np.float64], per_image: int) -> tuple[float, float]:
    """Lower bounds of the mean of one study [items] by a standard error alone: clustered, and of independent items."""
    sums = differences.reshape(-1, per_image).sum(axis=1)
    clustered = clustered_error(sums, np.full(len(sums), float(per_image)))
    naive = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    mean = float(differences.mean())
    return mean - _Z * clustered, mean - _Z * naive


def draw_differences(setting: Setting, studies: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Differences of ``studies`` studies: [studies, images * per_image]."""
    discordance = max(setting.discordance, abs(setting.truth))
    loss, gain = ((discordance + sign * setting.truth) / 2 / _MEAN_LOSS[setting.kind] for sign in (-1, 1))
    shape = (studies, setting.images, setting.per_image)
    shared = rng.random(shape) < math.sqrt(setting.correlation)
    draws = np.where(shared, rng.random((*shape[:2], 1)), rng.random(shape)).reshape(studies, -1)
    lost, won = draws < loss, draws > 1 - gain
    differences = np.zeros_like(draws)
    differences[lost] = -_amounts(setting.kind, draws[lost] / loss)
    differences[won] = _amounts(setting.kind, (1 - draws[won]) / gain)
    return differences


def summary(rates: Sequence[Rates]) -> dict[str, Any]:
    """Lowest and highest share of every group, and whether those of enough images are all within 4 to 6.5 %."""
    groups = dict.fromkeys(rate.setting.group for rate in rates)
    of = {group: [rate for rate in rates if rate.setting.group == group] for group in groups}
    ranges = {
        group: {name: [min(values), max(values)] for name, values in _columns(found).items()}
        for group, found in of.items()
    }
    main = of.get("four questions an image", [])
    return {"ranges": ranges, "within_4_to_6.5_percent": all(LOWEST <= rate.verdict <= HIGHEST for rate in main)}


def _columns(rates: Sequence[Rates]) -> dict[str, list[float]]:
    return {name: [round(getattr(r, name), 5) for r in rates] for name in ("verdict", "clustered", "naive")}


def _studies(setting: Setting, studies: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    for start in range(0, studies, _CHUNK):
        yield draw_differences(setting, min(_CHUNK, studies - start), rng)


def _amounts(kind: str, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    if kind == BINARY:
        return np.ones_like(shares)
    steps = np.clip(np.ceil(_STEPS * (shares - _WHOLE) / (1 - _WHOLE)), 1, _STEPS)
    return np.where(shares < _WHOLE, 1.0, _LEAST * steps)
