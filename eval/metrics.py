"""Relaxed accuracy (ChartQA) and ANLS (DocVQA), as lmms-eval scores them.

Published scores of one model differ by up to six points between harnesses, mostly because of small
differences in these functions, so every choice below follows one harness and the choices together carry a
version. A prediction is stripped before it is scored; a gold answer is taken as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

METRICS_VERSION = "1"
"""Raised whenever any score of either metric could change; stored with every result."""

RELATIVE_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """1.0 when ``prediction`` is within 5 % of a numeric ``answer`` or equals it as text, else 0.0.

    Relaxed accuracy of ChartQA (Masry et al. 2022) as pix2struct and lmms-eval compute it. "62%" is read as
    0.62; separators, currency signs and units make a text of a number. The tolerance is relative to the
    answer and inclusive, so an answer of zero (and any answer that is no number) is right only as equal text,
    case ignored.
    """
    prediction = prediction.strip()
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is not None and wanted:
        return float(abs(predicted - wanted) / abs(wanted) <= RELATIVE_TOLERANCE)
    return float(prediction.lower() == answer.lower())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest of ``answers``, in 0..1; below 0.5 it counts as 0.

    ANLS of DocVQA (Biten et al. 2019) as the official script and lmms-eval compute it: case and runs of white
    space do not count as edits, but the length that divides the edits is that of the texts before white space
    is collapsed, and a similarity of exactly 0.5 is kept. Without any answer the score is 0.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers is the text {answers!r}; it must be a sequence of texts: pass [{answers!r}]")
    prediction = prediction.strip()
    best = max((_similarity(prediction, answer) for answer in answers), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions that turn ``a`` into ``b`` (Wagner and Fischer 1974)."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            change = diagonal + (left != right)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)
    return row[-1]


@dataclass(frozen=True)
class Metric:
    """A named score of one prediction against the answers of one item."""

    name: str
    title: str
    score: Callable[[str, Sequence[str]], float]


def _best_relaxed(prediction: str, answers: Sequence[str]) -> float:
    return max((relaxed_accuracy(prediction, answer) for answer in answers), default=0.0)


RELAXED_ACCURACY = Metric("relaxed_accuracy", "relaxed accuracy", _best_relaxed)
ANLS = Metric("anls", "ANLS", anls)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _similarity(prediction: str, answer: str) -> float:
    # the official script measures upper-cased texts, where "ß" counts two
    length = max(len(prediction.upper()), len(answer.upper()))
    if length == 0:
        return 1.0
    return 1 - levenshtein(_folded(prediction), _folded(answer)) / length


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
