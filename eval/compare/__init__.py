"""Many systems on the same items, with both comparisons: ``python -m eval compare SYSTEM --self BF16 --dense D``."""
