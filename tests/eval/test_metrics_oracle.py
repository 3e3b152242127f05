"""Both metrics against slow oracles written from their definitions alone: own numbers, own arithmetic, own distance."""

import functools
import math
import re
import unicodedata
from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval.metrics import anls, relaxed_accuracy

DIGITS = r"\d(?:_?\d)*"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<name>inf|infinity|nan)|(?P<whole>{DIGITS})?(?P<dot>\.(?P<part>{DIGITS})?)?"
    rf"(?:e(?P<power>[+-]?{DIGITS}))?)",
    re.IGNORECASE,
)
LARGEST_POWER = 5000


def decimal_text(text: str) -> str:
    """Decimal digits of any script as ASCII, without separating underscores."""
    return "".join(
        str(unicodedata.decimal(c)) if unicodedata.decimal(c, None) is not None else c for c in text if c != "_"
    )


def rounded(value: Fraction) -> float:
    """The nearest double, infinite beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(text: str) -> float | None:
    """The double that a text spells, by the grammar of Python's float(); "%" at the end divides by 100."""
    percent = text.endswith("%")
    match = NUMBER.fullmatch(text.rstrip("%").strip() if percent else text.strip())
    if match is None:
        return None
    if match["name"]:
        value = math.nan if match["name"].lower() == "nan" else math.inf
    elif match["whole"] or match["part"]:
        whole, part = decimal_text(match["whole"] or ""), decimal_text(match["part"] or "")
        power = int(decimal_text(match["power"] or "0")) - len(part)
        power = max(-LARGEST_POWER, min(LARGEST_POWER, power))
        value = rounded(int(whole + part) * Fraction(10) ** power)
    else:
        return None
    value = -value if match["sign"] == "-" else value
    return quotient(value, 100.0) if percent else value


def quotient(a: float, b: float) -> float:
    """a / b for b != 0, rounded once."""
    if math.isnan(a) or math.isnan(b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    if math.isinf(a):
        return math.copysign(math.inf, a) * math.copysign(1, b)
    return 0.0 if math.isinf(b) else rounded(Fraction(a) / Fraction(b))


def difference(a: float, b: float) -> float:
    """|a - b|, rounded once."""
    if math.isnan(a) or math.isnan(b) or a == b == math.inf or a == b == -math.inf:
        return math.nan
    return math.inf if math.isinf(a) or math.isinf(b) else abs(rounded(Fraction(a) - Fraction(b)))


def slow_relaxed(prediction: str, gold: str) -> float:
    prediction = prediction.strip()
    p, g = number(prediction), number(gold)
    if p is None or g is None or g == 0:
        return 1.0 if prediction.lower() == gold.lower() else 0.0
    change = quotient(difference(p, g), abs(g))
    return 1.0 if not math.isnan(change) and change <= 0.05 else 0.0


def slow_distance(a: str, b: str) -> int:
    """The cost of the cheapest alignment, by recursion over both texts' ends."""

    @functools.cache
    def cost(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        if a[i - 1] == b[j - 1]:
            return cost(i - 1, j - 1)
        return 1 + min(cost(i - 1, j), cost(i, j - 1), cost(i - 1, j - 1))

    return cost(len(a), len(b))


def slow_anls(prediction: str, golds: list[str]) -> float:
    """The exact share of edits decides on the best answer; it is rounded as the reference rounds it."""
    prediction, best = prediction.strip(), Fraction(1)
    for gold in golds:
        longest = max(len(gold.upper()), len(prediction.upper()))
        words = [re.sub(r"\s+", " ", text.strip().lower()).strip() for text in (gold, prediction)]
        edits = Fraction(slow_distance(*words), longest) if longest else Fraction(0)
        best = min(best, edits)
    similarity = rounded(1 - Fraction(rounded(best)))
    return similarity if golds and similarity >= 0.5 else 0.0


BLANK = st.sampled_from(["", " ", "\t", "\n", "\u00a0", "\u2003", "  "])
DIGIT_RUN = st.lists(
    st.one_of(st.sampled_from("0123456789"), st.sampled_from("٠١٢٣٤٥٦٧٨٩०१५९８９𝟘𝟙𝟱"), st.sampled_from("_")), max_size=5
).map("".join)
SPELLED = st.builds(
    "".join,
    st.tuples(
        BLANK, st.sampled_from(["", "", "-", "+", "--", "$", "€"]), DIGIT_RUN, st.sampled_from(["", "", ".", ",", "٫"]),
        DIGIT_RUN, st.sampled_from(["", "", "", "e2", "E-3", "e400", "e", "e1_0", "e-400"]), BLANK,
        st.sampled_from(["", "", "%", "%%", " %"]), BLANK,
    ),
)  # fmt: skip
NAMED = st.sampled_from(["nan", "NaN", "-nan", "inf", "-Infinity", "+inf", "nan%", "inf%", "infinit", "0", "-0.0", "0%",
                         "", "%", "½", "²", "0x10", "1e5", "yes", "Yes.", "[Yes, No]", "1 000", "12 million", "ß",
                         "SS", "İ", "\ud800"])  # fmt: skip
TEXT = st.one_of(SPELLED, NAMED, st.text(max_size=6), st.floats().map(repr), st.integers(-3000, 3000).map(str))


@st.composite
def near(draw):
    """A gold and a prediction close to its 5 %, spelled in several ways."""
    gold = draw(st.one_of(st.integers(1, 4000), st.decimals(-999, 999, places=2, allow_nan=False)))
    share = draw(st.sampled_from(["0.95", "0.95", "1.05", "1.05", "0.9499", "1.0501", "1", "1.04999999999999993"]))
    value = Fraction(gold) * Fraction(share)
    form = draw(st.sampled_from(["{}", "{:.2f}", "{:.3e}", " {} ", "{}%"]))
    return form.format(float(value)), draw(st.sampled_from(["{}", "{}%", "{} "])).format(gold)


@settings(max_examples=1500, deadline=None)
@given(st.one_of(near(), st.tuples(TEXT, TEXT), TEXT.map(lambda t: (t, t)), TEXT.map(lambda t: (f" {t}\n", t))))
@example(("1.05", "1"))
@example(("105", "100"))
@example(("0.62", "62%"))
@example(("١٠٥", "1_00"))
@example(("-inf", "inf"))
@example(("5e-324", "1e308"))
@example(("1e308", "-1e308"))
@example(("% ", "%"))
@example(("\x1c12", "12"))
def test_relaxed_accuracy_equals_the_oracle(pair):
    assert relaxed_accuracy(*pair) == slow_relaxed(*pair)


WORD = st.text("aAbB ßİŉ\t\u00a0.5%", max_size=9)


@st.composite
def edited(draw):
    """Golds and a prediction that is one of them after some edits, so that scores around 0.5 are common."""
    golds = draw(st.lists(WORD, min_size=1, max_size=3))
    letters = list(draw(st.sampled_from(golds)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(letters)))
        letters[at : at + draw(st.integers(0, 1))] = draw(st.sampled_from(["", "x", "A", "  ", "ß"]))
    return "".join(letters), golds


@settings(max_examples=1000, deadline=None)
@given(st.one_of(edited(), st.tuples(TEXT, st.lists(TEXT, max_size=3)), st.tuples(WORD, st.lists(WORD, max_size=3))))
@example(("Smith", ["John Smith"]))
@example(("28", ["0.28"]))
@example(("ab", ["abcd", "zzzz"]))
@example(("abcdx" + " " * 16, ["abcdefgh"]))
@example(("x", ["abcdefgh" + " " * 8, "y"]))
@example(("", ["", "x"]))
@example(("STRASSE", ["straße"]))
def test_anls_equals_the_oracle(pair):
    prediction, golds = pair
    assert anls(prediction, golds) == slow_anls(prediction, golds)


def test_scores_of_exactly_one_half_are_kept_whatever_the_length():
    for n in range(1, 60):
        assert anls("a" * n, ["a" * n + "b" * n]) == 0.5
        assert anls("a" * n, ["a" * n + "b" * (n + 1)]) == 0.0
