"""The longest prompts that a row takes, made of the largest images that fit: what a memory promise is checked with."""

import math
from typing import Any

from PIL import Image

from expertflow_quant.runtime.prompts import Message, PromptEncoder, PromptError, Prompts

NEW_TOKENS = 2
SMALLEST_SIDE, LARGEST_SIDE = 32, 4096
BISECTIONS = 4
WORD = " 1"
WORDS_TRIED = 32


def longest_prompts(encoder: PromptEncoder, room: int, rows: int, tokens: int) -> Prompts:
    """As many equal prompts as one pass of ``tokens`` tokens and ``rows`` rows takes, each as long as a row of ``room``
    tokens allows beside ``NEW_TOKENS`` of an answer: images as large and as many as fit, then words."""
    limit = min(room, encoder.context or room)
    pictures = _pictures(encoder, limit)
    conversation = _asked(pictures, _words(encoder, limit, _width(encoder, pictures) or 0))
    count = max(1, min(rows, tokens // encoder.encode([conversation], NEW_TOKENS).width))
    return encoder.encode([conversation] * count, NEW_TOKENS)


def patches_per_token(encoder: PromptEncoder, config: Any) -> int:
    """Patches of a vision tower that become one image token, rounded up; 0 for a model that reads text only."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    try:
        prompts = encoder.encode([_asked([_square(SMALLEST_SIDE)], "")], 1)
    except PromptError:
        return 0
    pixels = prompts.inputs.get("pixel_values")
    if pixels is None or not prompts.image_tokens[0]:
        return 0
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    values = channels * vision.patch_size**2 * (getattr(vision, "temporal_patch_size", None) or 1)
    return math.ceil(pixels.numel() / values / prompts.image_tokens[0])


def _pictures(encoder: PromptEncoder, limit: int) -> list[Image.Image]:
    """The largest square that fits, as often as it fits; none where the model reads no images."""
    largest = _largest_side(encoder)
    if largest is None:
        return []
    picture = _square(largest)
    one, two = _width(encoder, [picture]), _width(encoder, [picture] * 2)
    if one is None or two is None or two <= one:
        return [picture]
    return [picture] * (1 + (limit - NEW_TOKENS - one) // (two - one))


def _largest_side(encoder: PromptEncoder) -> int | None:
    """The side of the square that becomes most tokens among those that fit; None where none does."""
    best, most, side = None, 0, SMALLEST_SIDE
    while side <= LARGEST_SIDE and (width := _width(encoder, [_square(side)])) is not None:
        if width > most:  # a processor enlarges what is small and makes what is large smaller
            best, most = side, width
        side *= 2
    if best is None or side > LARGEST_SIDE:
        return best
    low, high = side // 2, side
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        if _width(encoder, [_square(middle)]) is None:
            high = middle
        else:
            low = middle
    return low


def _words(encoder: PromptEncoder, limit: int, width: int) -> str:
    """Words that fill what ``width`` tokens leave of a row."""
    bare, tried = _width(encoder, [], ""), WORDS_TRIED
    while (some := _width(encoder, [], WORD * tried)) is None and tried:
        tried //= 2
    if bare is None or some is None or not tried:
        return ""
    rate = max(1.0, (some - bare) / tried)
    return WORD * max(0, int((limit - NEW_TOKENS - width) / rate) - 1)


def _width(encoder: PromptEncoder, pictures: list[Image.Image], text: str = "") -> int | None:
    """Tokens of a prompt of ``pictures`` and ``text``; None if it does not fit or the model does not read images."""
    try:
        return encoder.encode([_asked(pictures, text)], NEW_TOKENS).width
    except PromptError:
        return None


def _asked(pictures: list[Image.Image], text: str) -> list[Message]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _square(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), "white")
