"""From a seed to a picture with its questions; titles decide the split, so that splits never share one."""

import hashlib
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.samples import documents, words
from expertflow_quant.samples.canvas import Canvas
from expertflow_quant.samples.charts import draw_chart
from expertflow_quant.samples.item import Item, Question

TASKS = ("chart", "document")
SPLITS = ("train", "calibration", "test")


@dataclass(frozen=True)
class Sheet:
    """A picture and all that can be asked about it."""

    task: str
    family: str
    title: str
    canvas: Canvas
    questions: list[Question]


def split_of(title: str) -> str:
    """The only split in which a title may appear: 2 of 16 are for testing, 1 for calibration."""
    bucket = zlib.crc32(title.encode()) % 16
    return "test" if bucket < 2 else "calibration" if bucket == 2 else "train"


def _title(rng: random.Random, make: Callable[[random.Random], str], split: str) -> str:
    while True:
        title = make(rng)
        if split_of(title) == split:
            return title


def make_sheet(task: str, split: str, seed: int | str) -> Sheet:
    """The sheet of a task, split and seed: the same on every machine but for the ink of the installed FreeType."""
    if task not in TASKS or split not in SPLITS:
        raise ExpertFlowError(
            f"task {task!r}, split {split!r}: tasks are {TASKS}, splits are {SPLITS}; use one of them"
        )
    rng = random.Random(f"{task}/{split}/{seed}")
    if task == "chart":
        title = _title(rng, words.chart_title, split)
        canvas, family, questions = draw_chart(rng, title)
    else:
        family = rng.choice(list(documents.FAMILIES))
        make, draw = documents.FAMILIES[family]
        title = _title(rng, make, split)
        canvas = documents.new_page(rng)
        questions = draw(rng, canvas, title)
    return Sheet(task, family, title, canvas, questions)


def _items(task: str, split: str, seed: int, per_image: int) -> Iterator[Item]:
    number = 0
    while True:
        sheet = make_sheet(task, split, f"{seed}/{number}")
        image = sheet.canvas.image
        key = hashlib.sha1(image.tobytes()).hexdigest()
        rng = random.Random(f"ask/{task}/{split}/{seed}/{number}")
        by_kind: dict[str, list[Question]] = {}
        for question in sheet.questions:
            by_kind.setdefault(question.kind, []).append(question)
        kinds = rng.sample(list(by_kind), min(per_image, len(by_kind)))
        for i, kind in enumerate(kinds):
            asked = rng.choice(by_kind[kind])
            name = f"{task}-{split}-{seed}-{number:05d}-{i}"
            yield Item(name, task, kind, sheet.family, split, image, key, asked.text, asked.answers, sheet.title)
        number += 1


def make_items(task: str, split: str, n: int, seed: int = 0, per_image: int = 2) -> list[Item]:
    """`n` questions of one task, `per_image` different kinds on each picture.

    task: "chart" or "document"; split: "train", "calibration" or "test" (splits share no title, seed or picture).
    """
    if n < 0 or per_image < 1:
        raise ExpertFlowError(f"n = {n}, per_image = {per_image}: need n >= 0 and per_image >= 1")
    stream = _items(task, split, seed, per_image)
    return [next(stream) for _ in range(n)]
