"""The model under test, a checkpoint or a named shape: what every system of a run is built from."""

import copy
import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from eval.speed.random_model import MoeLayer, RandomModel, meta_model, moe_layers, random_backbone, random_whole
from eval.speed.random_records import RandomRecords
from eval.speed.shapes import SHAPES, Shape, named_shape
from eval.speed.sizes import ModelSizes, model_sizes
from eval.speed.traces import RouteSizes
from expertflow_quant.checkpoint.manifest import MANIFEST_FILE
from expertflow_quant.checkpoint.reader import CheckpointReader
from expertflow_quant.formats import BF16, ExpertFlowError, Format, RecordLayout
from expertflow_quant.models.seams import model_class, read_config
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.offload.layer_policy import BEST_LAYER_POLICY
from expertflow_quant.offload.slots import minimum_bytes
from expertflow_quant.offload.store import ExpertStore

AS_QUANTIZED = "as quantized"


class Target(Protocol):
    """Where a model's weights come from."""

    shape: Shape
    kind: str

    @property
    def format(self) -> str:
        """Of the experts, by name."""
        ...

    def expert_bytes(self, layers: tuple[MoeLayer, ...]) -> int:
        """All experts; nothing is read or made for it."""
        ...

    def backbone(self, device: torch.device, dtype: torch.dtype) -> RandomModel: ...
    def store(self, layers: tuple[MoeLayer, ...], pin: bool) -> ExpertStore: ...


@dataclass
class ShapeTarget:
    """A named shape with random weights."""

    shape: Shape
    format: str
    seed: int
    kind: str = "shape"

    def expert_bytes(self, layers: tuple[MoeLayer, ...]) -> int:
        format = Format.parse(self.format)
        return sum(layer.experts * RecordLayout(layer.shape, format).nbytes for layer in layers)

    def backbone(self, device: torch.device, dtype: torch.dtype) -> RandomModel:
        return random_backbone(self.shape.config, device, dtype, self.seed)

    def store(self, layers: tuple[MoeLayer, ...], pin: bool) -> ExpertStore:
        return ExpertStore(RandomRecords.of(layers, Format.parse(self.format), self.seed), pin=pin)


@dataclass
class CheckpointTarget:
    """One of our checkpoints. Its model and its host copy of the experts are loaded once and shared."""

    shape: Shape
    folder: Path
    format: str = AS_QUANTIZED
    kind: str = "checkpoint"
    _loaded: Any = None

    def expert_bytes(self, layers: tuple[MoeLayer, ...]) -> int:
        return ExpertStore(CheckpointReader(self.folder)).nbytes

    def backbone(self, device: torch.device, dtype: torch.dtype) -> RandomModel:
        if self._loaded is None:
            config = read_config(self.folder)
            # its own cache is not used here, so it is as small as can be
            smallest = minimum_bytes(ExpertStore(CheckpointReader(self.folder)).layers)
            config.quantization_config |= {"expert_memory": smallest, "verify": False}
            placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": str(device)}}
            self._loaded = model_class(config).from_pretrained(self.folder, config=config, dtype=dtype, **placed)
        layers = tuple(
            replace(layer, module=self._loaded.get_submodule(layer.name))
            for layer in moe_layers(meta_model(self.shape.config, dtype))
        )
        return RandomModel(self._loaded, layers)

    def store(self, layers: tuple[MoeLayer, ...], pin: bool) -> ExpertStore:
        if self._loaded is None:
            return ExpertStore(CheckpointReader(self.folder), pin=pin)
        store: ExpertStore = self._loaded.expert_cache.store
        return store


@dataclass
class Bench:
    """A target on a device, its sizes, and the host copy of its experts, of which it keeps the latest only. ``policy``:
    which expert makes room on our fast path."""

    target: Target
    device: torch.device
    seed: int = 0
    baseline_layers: int | None = None
    policy: str = BEST_LAYER_POLICY
    dtype: torch.dtype = field(init=False)
    layers: tuple[MoeLayer, ...] = field(init=False)
    sizes: ModelSizes = field(init=False)
    routes: RouteSizes = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        meta = meta_model(self.target.shape.config, self.dtype)
        self.layers = moe_layers(meta)
        self.sizes = model_sizes(meta, self.layers)
        self.routes = _route_sizes(self.layers)
        self._store: tuple[str, ExpertStore] | None = None

    @property
    def expert_bytes(self) -> int:
        """All experts in the target's own format."""
        return self.target.expert_bytes(self.layers)

    def backbone(self) -> RandomModel:
        """The model on the device without its experts."""
        return self.target.backbone(self.device, self.dtype)

    def whole(self, layers: int) -> RandomModel:
        """The first ``layers`` layers with random experts in bf16 in host memory, the rest on the device."""
        return random_whole(self._cut(layers), self.device, self.dtype, self.seed)

    def store(self, format: str) -> ExpertStore:
        """All experts in host memory, pinned for a GPU: in bf16 with random values, or as the target has them."""
        if self._store is None or self._store[0] != format:
            self._store = None
            gc.collect()
            pin = self.device.type == "cuda"
            if format == self.target.format:
                self._store = (format, self.target.store(self.layers, pin))
            else:
                self._store = (format, ExpertStore(RandomRecords.of(self.layers, BF16, self.seed), pin=pin))
            if pin and (self.target.kind == "shape" or format != self.target.format):
                require_pinned(self._store[1])
        return self._store[1]

    def sizes_of(self, layers: int) -> ModelSizes:
        """The sizes of the first ``layers`` layers."""
        if layers == len(self.layers):
            return self.sizes
        meta = meta_model(self._cut(layers), self.dtype)
        return model_sizes(meta, moe_layers(meta))

    def release(self) -> None:
        """Give memory that nobody holds any more back to the device, and watch its peak from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _cut(self, layers: int) -> Any:
        """The config with its first ``layers`` layers."""
        config = copy.deepcopy(self.target.shape.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        return config

    def peak_reserved_bytes(self) -> int | None:
        """Most device memory that was reserved since ``release``; None on the CPU."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None


def require_pinned(store: ExpertStore) -> None:
    """Random records have no file to be read from. Raises ExpertFlowError unless all of them were pinned."""
    if store.pinned_bytes < store.nbytes:
        raise ExpertFlowError(
            f"host memory holds {format_bytes(store.pinned_bytes)} of {format_bytes(store.nbytes)} of random experts: "
            "give fewer --layers, or leave out systems in bf16"
        )


def find_target(name: str, layers: int | None, tiny: bool, format: str | None, seed: int) -> Target:
    """The checkpoint folder or the named shape ``name``. Raises ExpertFlowError when it is neither, and for options
    that do not go with it."""
    if (Path(name) / MANIFEST_FILE).is_file():
        if layers is not None or tiny or format is not None:
            raise ExpertFlowError(
                f"{name} is a checkpoint, with layers and formats of its own: give no --layers, --tiny or --format"
            )
        config = read_config(name)
        del config.quantization_config
        count = int(config.get_text_config().num_hidden_layers)
        shape = Shape(Path(name).resolve().name, config, count, count, AS_QUANTIZED)
        return CheckpointTarget(shape, Path(name))
    if name not in SHAPES:
        raise ExpertFlowError(
            f"{name!r} is neither a checkpoint's folder nor a named shape: give a folder with {MANIFEST_FILE} or "
            f"one of {', '.join(SHAPES)}"
        )
    shape = named_shape(name, layers, tiny)
    return ShapeTarget(shape, Format.parse(format or shape.format).name, seed)


def _route_sizes(layers: tuple[MoeLayer, ...]) -> RouteSizes:
    kinds = {(layer.experts, layer.top_k) for layer in layers}
    if len(kinds) > 1:
        raise ExpertFlowError(
            f"layers differ in experts and top_k ({sorted(kinds)}): routes of one size cannot fit them"
        )
    experts, top_k = kinds.pop()
    return RouteSizes(len(layers), experts, top_k)
