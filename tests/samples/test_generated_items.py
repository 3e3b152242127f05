"""Generated charts and documents: splits never meet, answers agree with what is drawn, a seed draws the same."""

import itertools
import re

import numpy as np
import pytest

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.samples import make_items, make_sheet, split_of
from expertflow_quant.samples.canvas import SIZE
from expertflow_quant.samples.documents import FAMILIES as DOCUMENTS

TASKS = ("chart", "document")
SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module")
def sheets():
    return [make_sheet(task, split, seed) for task in TASKS for split in SPLITS for seed in range(120)]


def drawn(sheet):
    return {run.text for run in sheet.canvas.runs}


def test_a_title_belongs_to_one_split_only(sheets):
    titles = {split: set() for split in SPLITS}
    for (_task, split, _), sheet in zip(itertools.product(TASKS, SPLITS, range(120)), sheets, strict=True):
        assert split_of(sheet.title) == split
        assert sheet.title in drawn(sheet)
        titles[split].add(sheet.title)
    for a, b in itertools.combinations(SPLITS, 2):
        assert not titles[a] & titles[b]


def test_pictures_differ_within_and_across_splits():
    keys = [i.image_key for t in TASKS for s in SPLITS for i in make_items(t, s, 40, per_image=1)]
    assert len(set(keys)) == len(keys)


def test_every_family_appears(sheets):
    families = {sheet.family for sheet in sheets}
    assert families == {"bar", "line", "pie", "grouped", "stacked", *DOCUMENTS}


def test_values_that_are_read_are_drawn(sheets):
    for sheet in sheets:
        for question in sheet.questions:
            if question.kind in ("value", "extreme", "cell", "price", "quantity", "total", "date"):
                assert question.answers[0] in drawn(sheet), (sheet.family, question)


def test_arithmetic_answers_follow_from_the_drawn_values(sheets):
    checked = 0
    for sheet in sheets:
        values = {
            (run.row, run.column): float(run.text) for run in sheet.canvas.runs if run.row and sheet.task == "chart"
        }
        for question in sheet.questions:
            sum_of = re.fullmatch(r"What is the sum of (\w+) and (\w+)\?", question.text)
            gap_of = re.fullmatch(r"What is the difference between (\w+) and (\w+)\?", question.text)
            more = re.fullmatch(r"Is the value of (\w+) more than (\w+)\?", question.text)
            found = sum_of or gap_of or more
            if not found:
                continue
            a, b = (values[name, ""] for name in found.groups())
            if more:
                assert question.answers == ("Yes" if a > b else "No",)
            else:
                assert float(question.answers[0]) == pytest.approx(a + b if sum_of else abs(a - b))
            checked += 1
    assert checked > 300


def test_totals_are_the_sum_of_the_prices(sheets):
    for sheet in sheets:
        if sheet.family == "receipt":
            prices = [float(q.answers[0]) for q in sheet.questions if q.kind == "price"]
            (total,) = [q.answers[0] for q in sheet.questions if q.kind == "total"]
            assert float(total) == pytest.approx(sum(prices))


def test_text_stays_on_the_page_and_apart(sheets):
    for sheet in sheets:
        for run in sheet.canvas.runs:
            assert run.centres[0] >= 0, (sheet.family, run)
            assert run.centres[-1] < SIZE, (sheet.family, run)
            assert 0 <= run.y < SIZE, (sheet.family, run)


def test_questions_about_one_picture_have_one_answer(sheets):
    for sheet in sheets:
        answers = {}
        for question in sheet.questions:
            assert answers.setdefault(question.text, question.answers) == question.answers, (
                sheet.family,
                question,
            )


def test_the_same_call_gives_the_same_items():
    first, again = make_items("chart", "test", 6, seed=3), make_items("chart", "test", 6, seed=3)
    assert [i.id for i in first] == [i.id for i in again]
    for a, b in zip(first, again, strict=True):
        assert (a.question, a.answers, a.image_key) == (b.question, b.answers, b.image_key)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert make_items("chart", "test", 6, seed=4)[0].image_key != first[0].image_key


def test_prompts_are_the_harness_prompts():
    (chart,), (document,) = make_items("chart", "test", 1), make_items("document", "test", 1)
    assert chart.prompt == f"{chart.question}\nAnswer the question with a single word."
    assert document.prompt == f"{document.question}\nAnswer the question using a single word or phrase."
    assert (chart.max_new_tokens, document.max_new_tokens) == (16, 32)
    (turn,) = chart.messages
    assert [part["type"] for part in turn["content"]] == ["image", "text"]


@pytest.mark.parametrize(("task", "split"), [("video", "test"), ("chart", "dev")])
def test_unknown_names_are_refused(task, split):
    with pytest.raises(ExpertFlowError, match="use one of them"):
        make_items(task, split, 1)
