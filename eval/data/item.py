"""One question from a file, as every layout gives it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from eval.data.columns import Columns
from eval.data.errors import DamagedRowError
from eval.data.images import ImageFolder, ImageSource, check_image, decode, image_key, image_source
from expertflow_quant.samples.item import MAX_NEW_TOKENS, SUFFIX


@dataclass(frozen=True)
class DataItem:
    """A question about an image, with ``answers`` that each count as right.

    ``task`` names the data set ("chartqa"), ``style`` whose prompt and token limit hold ("chart" or "document").
    ``split`` is "human" or "augmented" for ChartQA, else the part of the data set; ``image_key`` the SHA-1 of the
    image's bytes; ``extras`` all other columns; ``damage`` why this row cannot be asked, if it cannot.
    """

    id: str
    task: str
    style: str
    question: str
    answers: tuple[str, ...]
    split: str
    kind: str
    image_key: str
    source: ImageSource | None = field(repr=False, compare=False)
    extras: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    damage: str | None = None
    max_pixels: int | None = None

    @property
    def family(self) -> str:
        """What scores are told apart by beside the kind: the split."""
        return self.split

    @property
    def image(self) -> Image.Image:
        """The picture, decoded anew at every call. Raises DamagedRowError if it cannot be."""
        if self.source is None:
            raise DamagedRowError(self.damage or "it has no image")
        return decode(self.source.read(), self.max_pixels)

    @property
    def prompt(self) -> str:
        """The question as lmms-eval words it."""
        return self.question + SUFFIX[self.style]

    @property
    def max_new_tokens(self) -> int:
        """lmms-eval's limit."""
        return MAX_NEW_TOKENS[self.style]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """One user turn: the picture, then the prompt. Raises DamagedRowError for a damaged row."""
        if self.damage is not None:
            raise DamagedRowError(self.damage)
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class RowReader:
    """From a row to an item. ``part``: the split that the file says; ``labels``: by column, its numbers' names."""

    task: str
    style: str
    columns: Columns
    folder: ImageFolder
    part: str
    labels: Mapping[str, tuple[str, ...]]
    max_pixels: int | None = None

    def item(self, row: Mapping[str, Any], position: int) -> DataItem:
        """The item of a row; whatever is wrong with it becomes its ``damage``."""
        columns = self.columns
        question, answers = row.get(columns.question), as_answers(row.get(columns.answers))
        split = split_name(self._named(row, columns.split), self.part)
        number = row.get(columns.id) if columns.id else None
        identity = f"{self.task}-{position if number in (None, '') else number}"
        source, key, damage = self._image(row.get(columns.image), identity)
        if not any(answer.strip() for answer in answers):
            damage = "it has no answers"
        if not isinstance(question, str) or not question.strip():
            question, damage = "", "it has no question"
        return DataItem(
            id=identity,
            task=self.task,
            style=self.style,
            question=question,
            answers=answers,
            split=split,
            kind=kind_name(self._named(row, columns.kind), split),
            image_key=key,
            source=source,
            extras={name: row[name] for name in columns.others if row.get(name) is not None},
            damage=damage,
            max_pixels=self.max_pixels,
        )

    def _image(self, value: object, identity: str) -> tuple[ImageSource | None, str, str | None]:
        source, key = None, f"no image of {identity}"
        try:
            source = image_source(value, self.folder)
            data = source.read()
            key = image_key(data)
            check_image(data)
        except DamagedRowError as damage:
            return source, key, str(damage)
        return source, key, None

    def _named(self, row: Mapping[str, Any], column: str | None) -> object:
        value = row.get(column) if column else None
        names = self.labels.get(column or "", ())
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def as_answers(value: object) -> tuple[str, ...]:
    """Accepted answers: a text stands for itself, whatever it looks like; a list for its members but nulls."""
    if value is None:
        return ()
    return tuple(str(v) for v in value if v is not None) if isinstance(value, (list, tuple)) else (str(value),)


def split_name(value: object, part: str) -> str:
    """human_test, test_human, human -> human; augmented_test, machine -> augmented; validation -> val; without a
    value, that of the file."""
    text = str(value if value not in (None, "") else part).lower()
    for name, pattern in (("human", "human"), ("augmented", "augmented|machine"), ("val", "^val(id(ation)?)?$")):
        if re.search(pattern, text):
            return name
    return text


def kind_name(value: object, split: str) -> str:
    """The first of the kinds that a row lists; the split where it lists none."""
    first = next((v for v in value if v), None) if isinstance(value, (list, tuple)) else value
    return str(first) if first else split
