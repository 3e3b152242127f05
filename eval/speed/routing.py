"""Routes forced on a model: its routers compute as ever, and their choice of experts is replaced."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from expertflow_quant.formats import ExpertFlowError


class ForcedRoutes:
    """Replaces the expert ids that every experts module is called with; the router's weights stay as they are.

    ``modules`` in model order; ``set`` before each pass, ``remove`` at the end.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._routes: Tensor | None = None
        self._handles = [module.register_forward_pre_hook(self._hook(layer)) for layer, module in enumerate(modules)]

    def set(self, routes: Tensor) -> None:
        """Routes of the coming pass, int64 ``[layers, tokens, top_k]`` on the model's device."""
        self._routes = routes

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def replace(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            if self._routes is None:
                raise ExpertFlowError("no routes were set for this pass: call set before the model")
            routes = self._routes[layer]
            if len(arguments) < 2 or arguments[1].shape != routes.shape:
                found = tuple(arguments[1].shape) if len(arguments) > 1 else "no positional ids"
                raise ExpertFlowError(
                    f"{type(module).__name__} of layer {layer} was called with {found}, the routes are "
                    f"{tuple(routes.shape)}: give routes of as many tokens, [rows * tokens, top_k]"
                )
            return (arguments[0], routes, *arguments[2:])

        return replace
