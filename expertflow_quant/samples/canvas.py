"""A small page to draw on, which remembers where each character landed."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SIZE = 192
FONTS = ("Aileron", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
Color = tuple[int, int, int]
BLACK: Color = (0, 0, 0)


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of FONTS at a height in pixels: Pillow's built-in face, else one of those that matplotlib carries."""
    if name == "Aileron":
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType: the samples cannot be drawn; install a Pillow wheel")
        return font
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1 << 16)
def text_mask(name: str, size: int, text: str) -> tuple[Image.Image, tuple[float, ...], int]:
    """The ink of a text, the horizontal centre of each character, and the line's height, in pixels."""
    font = load_font(name, size)
    ascent, descent = font.getmetrics()
    ends = [font.getlength(text[: i + 1]) for i in range(len(text))]
    mask = Image.new("L", (int(ends[-1]) + 2 if ends else 1, ascent + descent))
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    starts = [0.0, *ends[:-1]]
    centres = tuple((a + b) / 2 for a, b in zip(starts, ends, strict=True))
    return mask, centres, ascent + descent


@dataclass(frozen=True)
class TextRun:
    """A drawn text: the centre of each character in pixels, all on the line y, and what the text belongs to.

    `row` and `column` name what a value is the value of; `color` the colour of the mark that the text labels.
    """

    text: str
    centres: tuple[float, ...]
    y: float
    row: str = ""
    column: str = ""
    color: str = ""


@dataclass
class Canvas:
    """An RGB page of SIZE x SIZE pixels."""

    background: Color = (255, 255, 255)
    font: str = "Aileron"
    image: Image.Image = field(init=False)
    draw: ImageDraw.ImageDraw = field(init=False)
    runs: list[TextRun] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (SIZE, SIZE), self.background)
        self.draw = ImageDraw.Draw(self.image)

    def width(self, text: str, size: int, font: str | None = None) -> int:
        """Pixels that a text takes."""
        return text_mask(font or self.font, size, text)[0].width

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        *,
        anchor: str = "l",
        fill: Color = BLACK,
        font: str | None = None,
        row: str = "",
        column: str = "",
        color: str = "",
    ) -> int:
        """Draw with the top at y and the left, middle or right edge at x ("l", "m", "r"); returns the width."""
        mask, centres, height = text_mask(font or self.font, size, text)
        left = round(x - {"l": 0.0, "m": mask.width / 2, "r": float(mask.width)}[anchor])
        top = round(y)
        self.image.paste(fill, (left, top), mask)
        self.runs.append(TextRun(text, tuple(left + c for c in centres), top + height / 2, row, column, color))
        return mask.width
