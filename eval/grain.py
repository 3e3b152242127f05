"""Generated pictures made harder to read: grain, as of a photograph taken in the dark.

The shipped models answer nearly all of the clean pictures, and go on doing so when their experts are damaged; where
half of the answers hang by a thread, damage shows. The noise of a picture follows from its pixels, so every system and
every question of that picture sees the same.
"""

import hashlib
from dataclasses import replace

import numpy as np
from PIL import Image

from expertflow_quant.samples.item import Item

WHITE = 255


def grained(item: Item, grain: float) -> Item:
    """``item`` with normal noise of deviation ``grain`` (in levels of 255) on every channel of its picture."""
    if grain < 0:
        raise ValueError(f"grain {grain} is no deviation: give 0 (none) or more levels, of 255")
    if not grain:
        return item
    rng = np.random.default_rng(int.from_bytes(bytes.fromhex(item.image_key)[:8], "big"))
    clean = np.asarray(item.image.convert("RGB"), dtype=np.float64)
    pixels = np.clip(np.rint(clean + rng.normal(0.0, grain, clean.shape)), 0, WHITE).astype(np.uint8)
    image = Image.fromarray(pixels)
    return replace(item, image=image, image_key=hashlib.sha1(image.tobytes()).hexdigest())
