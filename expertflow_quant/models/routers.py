"""How a layer's router scores its experts, as far as a guess needs it: its weight and bias on hidden states."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.models.seams import find_router, num_experts


@dataclass(frozen=True)
class Router:
    """``weight`` float [E, H], and ``bias`` float [E] if there is one."""

    weight: Tensor
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., E] of the router's input [..., H], in its dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return functional.linear(hidden, self.weight.to(hidden.dtype), bias)


def router_of(model: nn.Module, name: str) -> Router:
    """The router beside the experts module ``name``. Raises ExpertFlowError for one without such a weight."""
    router = find_router(model, name)
    weight = None if router is None else router._parameters.get("weight")
    if weight is None or weight.ndim != 2 or len(weight) != num_experts(model.get_submodule(name)):
        raise ExpertFlowError(
            f"{name} has no router with a weight [experts, hidden], so later routers cannot be applied: do not look "
            "ahead with them"
        )
    bias = None if router is None else router._parameters.get("bias")
    return Router(weight.detach(), None if bias is None or bias.shape != weight.shape[:1] else bias.detach())
