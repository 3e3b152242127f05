"""Mixture-of-Experts (vision-)language models on small devices: experts quantized one by one, kept in host
memory, brought in on demand.

Importing the package teaches transformers to load its checkpoints: ``from_pretrained(OUT)`` works from then
on.
"""

from typing import TYPE_CHECKING, Any

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.formats.spec import Format
from expertflow_quant.runtime import quantizer as _registered  # noqa: F401  (registers with transformers)

if TYPE_CHECKING:
    from expertflow_quant.pipeline.quantize import quantize_model
    from expertflow_quant.runtime.engine import Engine
    from expertflow_quant.runtime.loading import load
    from expertflow_quant.runtime.quantizer import ExpertFlowConfig

__all__ = ["Engine", "ExpertFlowConfig", "ExpertFlowError", "Format", "load", "quantize_model"]
__version__ = "0.1.0"

_HOMES = {
    "Engine": "expertflow_quant.runtime.engine",
    "ExpertFlowConfig": "expertflow_quant.runtime.quantizer",
    "load": "expertflow_quant.runtime.loading",
    "quantize_model": "expertflow_quant.pipeline.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
