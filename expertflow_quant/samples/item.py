"""One question about one picture, and the prompts under which the standard harness asks it."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

SUFFIX = {
    "chart": "\nAnswer the question with a single word.",
    "document": "\nAnswer the question using a single word or phrase.",
}
MAX_NEW_TOKENS = {"chart": 16, "document": 32}


@dataclass(frozen=True)
class Question:
    """A question with its kind ("value", "sum", "date" ...) and the accepted answers."""

    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    `task` is "chart" (scored by relaxed accuracy) or "document" (scored by ANLS); `family` the kind of picture
    ("bar", "receipt" ...); `image` RGB, 192 x 192; `image_key` the SHA-1 of its pixels, for clustering by picture.
    """

    id: str
    task: str
    kind: str
    family: str
    split: str
    image: Image.Image
    image_key: str
    question: str
    answers: tuple[str, ...]
    title: str

    @property
    def prompt(self) -> str:
        """The question as the standard harness words it for this task."""
        return self.question + SUFFIX[self.task]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """One user turn: the picture, then the prompt."""
        content = [{"type": "image", "image": self.image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]

    @property
    def max_new_tokens(self) -> int:
        """The standard harness's limit for this task."""
        return MAX_NEW_TOKENS[self.task]
