"""Whether the verdict's error rates are what they should be: ``python -m eval calibrate-verdict --out FILE``."""
