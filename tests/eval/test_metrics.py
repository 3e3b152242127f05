import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.metrics import ANLS, RELAXED_ACCURACY, anls, levenshtein, relaxed_accuracy

VECTORS = json.loads((Path(__file__).parent / "metric_vectors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS["chart"], ids=lambda v: repr((v["prediction"], *v["answers"])))
def test_relaxed_accuracy_equals_the_harness(vector):
    assert relaxed_accuracy(vector["prediction"], vector["answers"][0]) == vector["expected"]
    assert RELAXED_ACCURACY.score(vector["prediction"], vector["answers"]) == vector["expected"]


@pytest.mark.parametrize("vector", VECTORS["document"], ids=lambda v: repr((v["prediction"], *v["answers"])))
def test_anls_equals_the_harness_and_the_official_script(vector):
    score = anls(vector["prediction"], vector["answers"])
    assert score == pytest.approx(vector["expected"]["lmms_eval.anls"], abs=1e-12)
    assert score == pytest.approx(vector["expected"]["rrc_official"], abs=1e-12)
    assert ANLS.score(vector["prediction"], vector["answers"]) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1.0),  # the tolerance is inclusive ...
        ("95", "100", 1.0),
        ("105.001", "100", 0.0),
        ("100", "95", 0.0),  # ... and relative to the answer
        ("2014", "2015", 1.0),
        ("1,234", "1234", 0.0),
        ("$12", "12", 0.0),
        ("12.", "12", 1.0),
        (" 62 ", "62", 1.0),
        ("62%", "0.62", 1.0),
        ("0.0", "0", 0.0),
        ("0%", "0%", 1.0),
        ("%", "%", 1.0),
        ("1_000", "1000", 1.0),
        ("٦٢", "62", 1.0),  # float() reads any script's digits, as the harness does
        ("nan", "nan", 0.0),
        ("inf", "inf", 0.0),
        ("-inf", "12", 0.0),
        ("1e308", "5e-324", 0.0),
        ("", "", 1.0),
        ("", "12", 0.0),
    ],
)
def test_relaxed_accuracy_at_the_edges(prediction, answer, score):
    assert relaxed_accuracy(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Smith", ["John Smith"], 0.5),  # exactly one half is kept
        ("28", ["0.28"], 0.5),
        ("abcx" + " " * 16, ["abcdefgh"], 0.0),
        ("abcdx" + " " * 16, ["abcdefgh"], 0.5),  # the prediction is stripped, so blanks do not lengthen it
        ("a  b", ["a b"], 1.0),
        ("x", [], 0.0),
        ("", [], 0.0),
        ("", ["", "x"], 1.0),
        (" \n", [""], 1.0),
    ],
)
def test_anls_at_the_edges(prediction, answers, score):
    assert anls(prediction, answers) == score


def test_anls_refuses_a_bare_text():
    with pytest.raises(TypeError, match=r"pass \['12'\]"):
        anls("12", "12")


def naive_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1,
        naive_distance(a, b[1:]) + 1,
        naive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abß1", max_size=5), st.text("abß1", max_size=5))
def test_levenshtein_equals_the_definition(a, b):
    assert levenshtein(a, b) == naive_distance(a, b)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_levenshtein_is_a_distance(a, b, c):
    assert levenshtein(a, a) == 0
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["nan", "-inf", "1e999", "%", "٦٢%", "", " ", "0%", "\ud800", "½", "1_0"]),
    st.floats().map(str),
)


@given(ANY_TEXT, st.lists(ANY_TEXT, max_size=3))
def test_any_text_gets_a_score_between_0_and_1(prediction, answers):
    assert 0.0 <= anls(prediction, answers) <= 1.0
    assert RELAXED_ACCURACY.score(prediction, answers) in (0.0, 1.0)


@given(ANY_TEXT)
def test_an_answer_is_right_against_itself(text):
    assert anls(text, [text]) >= (1.0 if text == text.strip() else 0.0)
