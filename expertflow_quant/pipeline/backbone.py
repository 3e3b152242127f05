"""A model for calibration: experts are left out, blocks are read while they run (``lazy``), the rest is in
place."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertflow_quant.models.seams import expert_modules, expert_parameters, model_class
from expertflow_quant.pipeline.forwards import EXPERTS_FUNCTION
from expertflow_quant.pipeline.lazy import lazy_weights
from expertflow_quant.pipeline.stream import ModelStream

_NAME = "expertflow-backbone"


@register_quantization_config(_NAME)
class _BackboneConfig(QuantizationConfigMixin):
    """Only ever passed to from_pretrained by ``load_backbone``; never saved. ``lazy`` makes what is read later."""

    def __init__(self, lazy: Any = None, **kwargs: Any) -> None:
        self.quant_method = _NAME
        self.lazy = lazy


@register_quantizer(_NAME)
class _BackboneQuantizer(HfQuantizer):
    """The seam through which transformers lets a model be changed before its weights are read."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        waiting = self.quantization_config.lazy(model)
        waiting.detach()
        tied = {
            target: of for target, of in model.all_tied_weights_keys.items() if not {target, of} & set(waiting.names)
        }
        model.all_tied_weights_keys = tied
        ignored |= {rf"(^|\.){re.escape(name)}$" for name in waiting.names}
        model.lazy_weights = waiting
        for name, module in expert_modules(model):
            for parameter in expert_parameters(module).values():
                del module._parameters[parameter]
            module._is_hf_initialized = True  # type: ignore[assignment]
            ignored.add(rf"(^|\.){re.escape(name.removeprefix(model.base_model_prefix + '.'))}\.")
        model._keys_to_ignore_on_load_unexpected = ignored
        model.set_experts_implementation(EXPERTS_FUNCTION)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        return


def load_backbone(stream: ModelStream, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model of a stream's folder in evaluation mode: its experts' answers come from what
    observes it, its blocks' weights (``model.lazy_weights``) are there while a forward is in them."""
    with quiet():
        model = model_class(stream.config).from_pretrained(
            stream.folder,
            dtype=dtype,
            quantization_config=_BackboneConfig(lambda model: lazy_weights(model, stream, device, dtype)),
        )
    model = model.to(device).eval()
    model.lazy_weights.attach()
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
