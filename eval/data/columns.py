"""Which column means what, by its name: the public copies of one data set name them differently."""

from collections.abc import Iterable
from dataclasses import dataclass

from eval.data.errors import DataError

QUESTION = ("question", "query")
ANSWERS = ("answers", "answer", "label")
IMAGE = ("image", "imgname", "image_local_name", "image_path", "image_filename")
SPLIT = ("type", "human_or_machine", "split", "data_split")
KIND = ("question_types", "question_type", "answer_type", "chart_type")
ID = ("questionId", "question_id", "qid", "index")
LEFT_OUT = ("ocr", "__index_level_0__")
"""Recognised text (tens of kilobytes a row, in no prompt) and a row number that pandas leaves."""

LABELS = {"human_or_machine": ("human", "machine")}
"""Names behind the numbers of a column, for files that lost them."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are understood; ``others`` go into an item's extras."""

    question: str
    answers: str
    image: str
    split: str | None
    kind: str | None
    id: str | None
    others: tuple[str, ...]

    @classmethod
    def detect(cls, names: Iterable[str], where: str) -> "Columns":
        """Raises DataError naming ``where`` if question, answers or image cannot be told."""
        present = list(names)

        def first(wanted: tuple[str, ...]) -> str | None:
            return next((name for name in wanted if name in present), None)

        def required(wanted: tuple[str, ...], what: str) -> str:
            if (name := first(wanted)) is None:
                raise DataError(
                    f"{where} has no column for the {what}: it has {', '.join(present) or 'none'}; "
                    f"rename the right one to {' or '.join(wanted)}"
                )
            return name

        question, answers = required(QUESTION, "question"), required(ANSWERS, "answers")
        image, split, kind, identity = required(IMAGE, "image"), first(SPLIT), first(KIND), first(ID)
        used = {question, answers, image, *LEFT_OUT}
        return cls(question, answers, image, split, kind, identity, tuple(n for n in present if n not in used))

    @property
    def light(self) -> list[str]:
        """All columns to be read at once: everything but the image and what is left out."""
        return [self.question, self.answers, *self.others]
