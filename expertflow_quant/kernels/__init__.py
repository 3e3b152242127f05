"""Products with experts' weights. Import from here, never from a kernel's file."""

from expertflow_quant.kernels.reference import ExpertWeights, dequantize, expert_product, expert_weights

__all__ = ["ExpertWeights", "dequantize", "expert_product", "expert_weights"]
