"""The plain PyTorch twin of the product for few tokens: pair by pair, on the CPU."""

import torch
from torch import Tensor

from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.host_view import record_at
from expertflow_quant.kernels.reference import expert_product, expert_weights
from expertflow_quant.kernels.table import LayoutTable


def few_product_reference(
    hidden: Tensor, ids: Tensor, weights: Tensor, addresses: Tensor, row_of: Tensor, table: LayoutTable, gate: Gate
) -> Tensor:
    """What ``few_product`` computes, from records in host memory: same arguments, same result ``[T, H]``.

    Each expert's product is rounded to hidden's dtype, as the plain path does; the weighted sum is float32, in top-k
    order, rounded once. Expert ids past the last add nothing.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    for token, (experts, shares) in enumerate(zip(ids.tolist(), weights.float().tolist())):
        for expert, share in zip(experts, shares):
            if expert >= len(addresses):
                continue
            layout = table.layouts[int(row_of[expert])]
            record = record_at(int(addresses[expert]), layout.nbytes)
            decoded = expert_weights(layout.views(record), layout, hidden.dtype)
            out[token] += share * expert_product(hidden[token : token + 1], decoded, gate.apply)[0].float()
    return out.to(hidden.dtype)
