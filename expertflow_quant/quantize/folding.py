"""Which rows of gate_up may carry a scale meant for down's input, found by asking the gate itself.

``act(g) * u`` is linear in u: a scale on u's rows comes out of the gate unchanged. Clamped or shifted gates
are not, and then nothing can be folded. Asking with numbers covers every activation without a table of model
names.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Gate = Callable[[Tensor], Tensor]
_PROBES = 16  # rows of random pre-activations, from tiny to well beyond where gates clamp


def scalable_rows(gate: Gate, rows: int, intermediate: int, device: torch.device | None = None) -> slice | None:
    """The ``intermediate`` rows of gate_up ``[rows, H]`` whose scale passes through ``gate``, if any do.

    Tried: the second half (gate and up one after the other), the odd rows (interleaved), or all rows where
    there is no gate. ``gate`` maps ``[n, rows]`` to ``[n, intermediate]``.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, _PROBES).unsqueeze(-1)
    probe = (torch.randn(_PROBES, rows, generator=generator) * sizes).to(device)
    factors = torch.exp(torch.randn(intermediate, generator=generator)).to(device)
    want = gate(probe) * factors
    for candidate in _candidates(rows, intermediate):
        scaled = probe.clone()
        scaled[:, candidate] *= factors
        if torch.allclose(gate(scaled), want, rtol=1e-4, atol=1e-6):
            return candidate
    return None


def _candidates(rows: int, intermediate: int) -> list[slice]:
    if rows == intermediate:
        return [slice(0, rows)]
    return [slice(intermediate, rows), slice(1, rows, 2)]
