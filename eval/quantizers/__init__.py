"""The library's GPTQ and AWQ beside slow, independent implementations: ``python -m eval quantizers``."""
