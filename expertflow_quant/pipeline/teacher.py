"""A whole model in memory that is told the answers, with its experts replaced at will: how far do its predictions
move?

Every conversation is read once with its answer (teacher forcing), so all answer tokens are predicted in one forward,
and two sets of experts are compared token by token by the Kullback-Leibler divergence of their predictions. Only
experts ever change, so what the vision tower makes of the pictures is computed once and kept.

For small changes no second forward is needed. With answer tokens predicted from logits ``z / temperature``, changes
``d`` of what the experts of a layer answer cost, to second order,

    KL  =  1/2 sum over answer tokens of (J d)^T F (J d)  =  1/2 E[(g . d)^2],    F = diag(p) - p p^T,

where ``g = J^T v`` is one backward pass from random ``v`` with covariance F, drawn anew for each answer token
(Gauss-Newton; the random v as in Hutchinson 1990): a few passes say what any change of any expert would cost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import ExpertWeights
from expertflow_quant.models.seams import expert_modules, expert_parameters, model_class, read_config
from expertflow_quant.pipeline.backbone import quiet
from expertflow_quant.pipeline.batches import AnsweredBatch, Batch


@dataclass(frozen=True)
class ExpertsSeen:
    """A layer's experts in one forward: inputs ``[T, H]``, chosen ids and affinities ``[T, k]``."""

    hidden: Tensor
    index: Tensor
    affinity: Tensor


class Teacher:
    """The transformers model of ``folder``, in memory, in ``dtype``. Raises ExpertFlowError for a model without
    experts."""

    def __init__(
        self, folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        config = read_config(folder)
        with quiet():
            self.model = model_class(config).from_pretrained(folder, config=config, dtype=dtype).to(device).eval()
        self.model.requires_grad_(False)
        self.experts: list[nn.Module] = [module for _, module in expert_modules(self.model)]
        self._own = [
            {name: module.get_parameter(name).detach().clone() for name in expert_parameters(module).values()}
            for module in self.experts
        ]
        self._memo = _PictureMemo(self.model.base_model)

    def own(self, layer: int, expert: int) -> ExpertWeights:
        """The model's own weights of one expert, as ``put`` takes them."""
        module = self.experts[layer]
        tensors = {name: self._own[layer][given][expert] for name, given in expert_parameters(module).items()}
        return ExpertWeights(
            **{
                name: tensor.T.contiguous() if module.is_transposed and tensor.ndim == 2 else tensor
                for name, tensor in tensors.items()
            }
        )

    @torch.no_grad()
    def log_probs(self, batch: AnsweredBatch) -> Tensor:
        """float32 (float64 of a float64 model) [N, V]: what the model predicts at every answer token."""
        return _at_least_float32(self._logits(batch)).log_softmax(-1)

    @torch.no_grad()
    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Replaces one expert; an input scale is multiplied into its columns."""
        module = self.experts[layer]
        for name, parameter in expert_parameters(module).items():
            tensor = getattr(weights, name)
            if name == "gate_up" and weights.input_scale is not None:
                tensor = tensor * weights.input_scale
            module.get_parameter(parameter)[expert].copy_(
                tensor.T if module.is_transposed and tensor.ndim == 2 else tensor
            )

    @torch.no_grad()
    def restore(self) -> None:
        """The model's own experts again."""
        for own, module in zip(self._own, self.experts, strict=True):
            for name, tensor in own.items():
                module.get_parameter(name).copy_(tensor)

    @torch.enable_grad()
    def gradients(
        self, batch: AnsweredBatch, probes: int, temperature: float, noise: torch.Generator
    ) -> tuple[list[ExpertsSeen], list[list[Tensor]]]:
        """What every layer's experts saw, and for each probe the gradients ``g`` [T, H] at every layer's experts'
        output, padding included. Raises ExpertFlowError where a layer does not run exactly once in a forward."""
        with _watching(self.experts) as (seen, added):
            logits = self._logits(batch)
            if sorted(seen) != list(range(len(self.experts))):
                raise ExpertFlowError(
                    f"{len(seen)} of {len(self.experts)} MoE layers ran: measure at the experts' outputs instead"
                )
            root = (_at_least_float32(logits.detach()) / temperature).softmax(-1).sqrt()
            places = [added[layer] for layer in range(len(self.experts))]
            found = []
            for _ in range(probes):
                drawn = root * torch.randn(root.shape, generator=noise).to(root.device)
                pull = (drawn - root.square() * (root * drawn).sum(-1, keepdim=True)) / temperature
                found.append(list(torch.autograd.grad(logits, places, pull.to(logits.dtype), retain_graph=True)))
        return [seen[layer] for layer in range(len(self.experts))], [
            [grad.reshape(-1, grad.shape[-1]) for grad in of_probe] for of_probe in found
        ]

    def _logits(self, batch: AnsweredBatch) -> Tensor:
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        width = inputs["input_ids"].shape[1]
        rows, columns = batch.places // width, batch.places % width
        kept, at = torch.unique(columns, return_inverse=True)
        with self._memo.batch(batch.inputs):
            logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=kept.to(device)).logits
        return logits[rows.to(device), at.to(device)]


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence float64 [N] in nats of ``other`` from ``reference``, both log-probabilities
    ``[N, V]``."""
    exact = reference.double()
    return (exact.exp() * (exact - other.double())).sum(-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _watching(experts: Sequence[nn.Module]) -> Iterator[tuple[dict[int, ExpertsSeen], dict[int, Tensor]]]:
    """Notes what every layer's experts see, and adds to their output a zero whose gradient can be asked for."""
    seen: dict[int, ExpertsSeen] = {}
    added: dict[int, Tensor] = {}

    def note(layer: int, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden, index, affinity = (part.detach().reshape(-1, part.shape[-1]) for part in arguments)
        seen[layer] = ExpertsSeen(hidden, index, affinity)
        added[layer] = torch.zeros_like(output, requires_grad=True)
        return output + added[layer]

    hooks = [
        module.register_forward_hook(lambda _, arguments, output, layer=layer: note(layer, arguments, output))
        for layer, module in enumerate(experts)
    ]
    try:
        yield seen, added
    finally:
        for hook in hooks:
            hook.remove()


class _PictureMemo:
    """Keeps the features of each batch's pictures; does nothing for a model that has none."""

    def __init__(self, base: Any) -> None:
        self._kept: dict[int, tuple[Batch, Any]] = {}
        self._now: Batch | None = None
        if hasattr(base, "get_image_features"):
            base.get_image_features = self._remembering(base.get_image_features)

    @contextmanager
    def batch(self, inputs: Batch) -> Iterator[None]:
        self._now = inputs
        try:
            yield
        finally:
            self._now = None

    def _remembering(self, features: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(features)  # generate reads its signature
        def remembered(*arguments: Any, **options: Any) -> Any:
            if self._now is None:
                return features(*arguments, **options)
            key = id(self._now)
            if key not in self._kept:  # the batch is kept with its features, so that no other one can have its id
                with torch.no_grad():
                    self._kept[key] = (self._now, features(*arguments, **options))
            return self._kept[key][1]

        return remembered
