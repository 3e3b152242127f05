"""Images of rows, read only when they are needed: bytes as they lie in a file, and the picture that they make."""

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from eval.data.errors import DamagedRowError

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageSource(Protocol):
    """Where an image's bytes come from."""

    def read(self) -> bytes:
        """The encoded image. Raises DamagedRowError where there is none."""


@dataclass(frozen=True)
class HeldImage:
    """Bytes in memory."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class FileImage:
    """A file of its own."""

    path: Path

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DamagedRowError(f"image file {self.path.name} cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class CellImage:
    """A cell of a table, fetched again whenever it is wanted; ``folder`` holds images that cells only name."""

    fetch: Callable[[], object]
    folder: "ImageFolder"

    def read(self) -> bytes:
        return image_source(self.fetch(), self.folder).read()


@dataclass(frozen=True)
class ImageFolder:
    """Where the images lie that rows name: below one of ``roots`` under the path that is named, or anywhere below one
    under that file name; the first root comes first."""

    roots: tuple[Path, ...]

    def find(self, name: str) -> Path:
        """The file of that name; where there is none, the path at which it was expected."""
        for root in self.roots:
            if (root / name).is_file():
                return root / name
        return self._by_name.get(Path(name).name, self.roots[0] / name)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for root in self.roots:
            for folder, _, names in sorted(os.walk(root)):
                for name in names:
                    found.setdefault(name, Path(folder) / name)
        return found


def image_source(value: object, folder: ImageFolder) -> ImageSource:
    """What a table may hold for an image: bytes, a {"bytes", "path"} pair, a file name or a PIL image."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return HeldImage(bytes(value))
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return HeldImage(buffer.getvalue())
    if isinstance(value, str) and value:
        return FileImage(folder.find(value))
    if hasattr(value, "read"):
        return value
    raise DamagedRowError("it has no image")


def image_key(data: bytes) -> str:
    """SHA-1 of an image's bytes: questions about one image share it."""
    return hashlib.sha1(data).hexdigest()


def check_image(data: bytes) -> None:
    """Raise DamagedRowError unless the bytes begin like an image and, where the format has checksums (PNG), these are
    right. A JPEG cut short is found only when it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except UNREADABLE as error:
        raise _undecodable(data, error) from error


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """The picture, RGB, upright as its EXIF data says; shrunk to at most ``max_pixels`` where that is set."""
    try:
        picture: Any = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except UNREADABLE as error:
        raise _undecodable(data, error) from error
    width, height = picture.size
    if max_pixels is None or width * height <= max_pixels:
        return picture
    shrink = math.sqrt(max_pixels / (width * height))
    smaller = max(1, math.floor(width * shrink)), max(1, math.floor(height * shrink))
    return picture.resize(smaller, Image.Resampling.LANCZOS)


def _undecodable(data: bytes, error: Exception) -> DamagedRowError:
    reason = type(error).__name__ if "BytesIO" in str(error) else f"{type(error).__name__}: {error}"
    return DamagedRowError(f"its image of {len(data)} bytes cannot be decoded ({reason})")
