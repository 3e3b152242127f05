"""How transformers loads our checkpoints: a quantization config and a quantizer, registered on import.

``AutoModelForImageTextToText.from_pretrained(OUT)`` builds the model without weights; here its experts
modules lose their parameters before anything is read, the backbone is read by transformers as usual, and at
the end every experts module gets a place in one cache over the checkpoint's records. Experts never exist as
model weights.

The non-expert weights are named backbone.safetensors, which nobody but this quantizer asks for: without this
package transformers finds no weights and refuses, instead of running with random experts.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers import auto as transformers_auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertflow_quant.checkpoint.manifest import LayerEntry
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.checkpoint.writer import BACKBONE_FILE, BACKBONE_INDEX
from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.seams import expert_modules, expert_parameters, expert_shape, top_k
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.offload.slots import plan_slots
from expertflow_quant.offload.store import ExpertStore
from expertflow_quant.runtime.caching import CacheOptions, make_cache
from expertflow_quant.runtime.experts import NAME, LayerExperts, attach, attached, experts_forward

VERSION = 1
LOADING_OPTIONS = ("expert_memory", "verify", "place")


@register_quantization_config("expertflow")
class ExpertFlowConfig(QuantizationConfigMixin):
    """What config.json says of our checkpoints, and how to load them.

    ``expert_memory``: device bytes for experts, as ``offload.budget.parse_budget`` reads them (default: all
    resident). ``verify``: check the sha256 of every file before loading (default), not only the sizes. ``place``:
    False leaves the experts in their files as ``model.expert_store``, for the engine to pin and place. Give
    them as ``from_pretrained(OUT, quantization_config=ExpertFlowConfig(expert_memory="2MiB"))``; they are
    never saved. Raises ExpertFlowError for a version or an option that this build does not know.
    """

    def __init__(
        self,
        expert_memory: int | str = "100%",
        verify: bool = True,
        place: bool = True,
        version: int = VERSION,
        quant_method: str = NAME,
        **unknown: Any,
    ) -> None:
        if unknown or version != VERSION:
            odd = ", ".join(sorted(unknown)) or f"version {version!r}"
            raise ExpertFlowError(
                f"quantization_config has {odd}, which this build (version {VERSION}) does not know: use the "
                "matching expertflow-quant or quantize again"
            )
        self.quant_method = quant_method
        self.version = version
        self.expert_memory = expert_memory
        self.verify = verify
        self.place = place

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to ``from_pretrained`` overrides in the checkpoint's own."""
        return {name: getattr(self, name) for name in LOADING_OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """What belongs into config.json: everything but how it was loaded."""
        return {name: value for name, value in super().to_dict().items() if name not in LOADING_OPTIONS}


@register_quantizer("expertflow")
class ExpertFlowQuantizer(HfQuantizer):
    """Takes the experts out of a model before its weights are read and puts one cache in their place.

    After loading, ``model.expert_store`` has the records and ``model.expert_cache`` is that cache. Raises
    ExpertFlowError (BudgetError, CheckpointError) before any weight is read when the folder, the model or the budget
    does not fit.
    """

    quantization_config: ExpertFlowConfig

    def __init__(self, quantization_config: ExpertFlowConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ExpertFlowError(
                "this model is not an expertflow checkpoint: run `expertflow-quant quantize MODEL OUT` and "
                "load OUT; a quantization_config cannot quantize while loading"
            )
        super().__init__(quantization_config, **kwargs)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        """Asked by ``save_pretrained`` alone. Raises ExpertFlowError: the experts are not in the model."""
        raise ExpertFlowError(
            "save_pretrained cannot write expert records, which never were in the model: copy the checkpoint "
            f"folder {getattr(self, '_folder', '')} instead"
        )

    def update_device_map(self, device_map: Any) -> Any:
        """One device for the whole model, since its experts share one cache."""
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
            raise ExpertFlowError(
                f"device_map {device_map} spreads the model over several devices: its experts share one "
                "cache on one device; give a single device, and in expert_memory what experts may take of it"
            )
        return device_map

    def update_tp_plan(self, config: Any) -> Any:
        """Called before the weight files are looked for (transformers up to 5.22): names ours."""
        sharded = (Path(config.name_or_path) / BACKBONE_INDEX).is_file()
        config.transformers_weights = BACKBONE_INDEX if sharded else BACKBONE_FILE
        return config

    def update_attn_implementation(self, config: Any) -> Any:
        """The call that later versions of transformers make at the same point."""
        return self.update_tp_plan(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ExpertFlowError("an expertflow checkpoint is loaded from its folder, not from a state dict")
        self._folder = Path(checkpoint_files[0]).parent
        self._reader = CheckpointReader(self._folder)
        if self.quantization_config.verify:
            self._reader.verify(full=True)
        self._store = ExpertStore(self._reader)
        if self.quantization_config.place:
            self._budget = parse_budget(self.quantization_config.expert_memory, self._store.nbytes)
            plan_slots(self._store.layers, self._budget)
        self._modules = _matching_modules(model, self._reader.layers)
        for module in self._modules:
            _strip(module)
        model.set_experts_implementation(NAME)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        place, device = self.quantization_config.place, next(model.parameters()).device
        del model.config.transformers_weights  # ours to set, not the model's to keep
        for layer, module in enumerate(self._modules):
            attach(module, LayerExperts(None, layer))
        model.expert_store = ExpertStore(self._reader, pin=True) if place and device.type == "cuda" else self._store
        if place:
            attach_cache(model, self._budget)


def attach_cache(model: Any, budget_bytes: int, options: CacheOptions | None = None) -> None:
    """Give ``model``, which has its ``expert_store``, the plain path's cache of ``budget_bytes`` on its device.

    Raises BudgetError when that is below one token's working set.
    """
    cache = make_cache(model.expert_store, budget_bytes, next(model.parameters()).device, options or CacheOptions())
    for module in attached(model):
        attach(module, LayerExperts(cache, getattr(module, NAME).layer))
    model.expert_cache = cache


def _matching_modules(model: Any, layers: list[LayerEntry]) -> list[Any]:
    """The model's experts modules in the checkpoint's order; a class without its head lacks the name's
    prefix.

    Raises ExpertFlowError unless model and checkpoint have the same.
    """
    found = dict(expert_modules(model))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = [name if name in found else name.removeprefix(prefix) for name in (entry.module for entry in layers)]
    if set(names) != set(found):
        odd = sorted(set(names) ^ set(found))
        raise ExpertFlowError(
            f"the checkpoint's MoE layers are not those of {type(model).__name__}, they differ in "
            f"{', '.join(odd[:3])}: restore config.json or quantize again"
        )
    for name, entry in zip(names, layers, strict=True):
        _check_sizes(name, found[name], entry)
        if (routed := top_k(model, name)) != entry.top_k:
            raise ExpertFlowError(
                f"{name} routes a token to {routed} experts by config.json, to {entry.top_k} by the manifest: "
                "restore config.json or quantize again"
            )
    return [found[name] for name in names]


def _check_sizes(name: str, module: Any, entry: LayerEntry) -> None:
    wanted, made = (expert_shape(module), module.num_experts), (entry.shape, len(entry.experts))
    if wanted != made:
        raise ExpertFlowError(
            f"{name} has {wanted[1]} experts of {wanted[0]} by config.json, {made[1]} of {made[0]} by the "
            "manifest: restore config.json or quantize again"
        )


def _strip(module: Any) -> None:
    """Take the expert weights, which are on the meta device, out of ``module``."""
    for name in expert_parameters(module).values():
        del module._parameters[name]
    module._is_hf_initialized = True  # otherwise transformers initialises the absent parameters


def _register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    # Without this a quantization_config given to from_pretrained is ignored in favour of the saved one.
    transformers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (ExpertFlowConfig,)


_register()
