"""Images out of data URLs, bounded before a pixel is decoded. Nothing is fetched or opened by name."""

import base64
import binascii
import io
import re

from PIL import Image, ImageOps

from expertflow_quant.serve.errors import ApiError
from expertflow_quant.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_ASPECT = 200
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr"})
_HEAD = re.compile(r"data:(image/[a-z0-9.+-]+)?((?:;[a-z0-9_-]+=[^;,]*)*)(;base64)?,", re.IGNORECASE)
_EXAMPLE = "send the picture itself as data:image/png;base64,..."


def decode_images(urls: list[str], limits: Limits) -> list[Image.Image]:
    """Data URLs to RGB images, upright as EXIF says, transparency on white. ApiError says what broke."""
    if len(urls) > limits.max_images:
        raise _refused(f"the request holds {len(urls)} images; at most {limits.max_images} are read")
    opened, pixels = [], 0
    for number, url in enumerate(urls):
        image = _open(_payload(url, number), number, limits)
        pixels += image.width * image.height
        opened.append(image)
    if pixels > limits.max_request_pixels:
        raise _refused(f"together the images have {pixels} pixels; at most {limits.max_request_pixels} are read")
    return [_rgb(image, number) for number, image in enumerate(opened)]


def _payload(url: str, number: int) -> bytes:
    head = _HEAD.match(url[:512])
    if head is None:
        kind = "a web address" if re.match(r"(?i)https?:", url) else "not a data URL of an image"
        raise _refused(f"image {number}: {_short(url)} is {kind}; nothing is fetched or opened here: {_EXAMPLE}")
    if head.group(3) is None:
        raise _refused(f"image {number}: the data URL is not base64: {_EXAMPLE}")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"image {number}: its base64 is damaged ({error}): encode it again") from None


def _open(data: bytes, number: int, limits: Limits) -> Image.Image:
    known = ", ".join(FORMATS)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        animated = bool(getattr(image, "is_animated", False))
    except _UNREADABLE as error:
        raise _refused(f"image {number}: its {len(data)} bytes are no {known}: {_reason(error)}") from None
    width, height = image.size
    if width * height > limits.max_image_pixels:
        raise _refused(f"image {number} is {width}x{height}; at most {limits.max_image_pixels} pixels are read: shrink")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _refused(f"image {number} is {width}x{height}; sides may differ {MAX_ASPECT} times: crop it")
    if animated:
        raise _refused(f"image {number} is animated: send the one frame that is meant")
    if image.mode not in _MODES:
        raise _refused(f"image {number} has mode {image.mode}: convert it to 8-bit RGB")
    return image


def _rgb(image: Image.Image, number: int) -> Image.Image:
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")
    except _UNREADABLE as error:
        raise _refused(f"image {number} is damaged ({_reason(error)}): encode it again") from None


def _refused(message: str) -> ApiError:
    return ApiError(message, param="messages", code="invalid_image")


def _reason(error: Exception) -> str:
    return re.sub(r" <_io\.BytesIO.*?>", "", str(error)) or type(error).__name__


def _short(url: str) -> str:
    return repr(url if len(url) <= 60 else url[:57] + "...")
