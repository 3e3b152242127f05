"""Quantize a model: stream its weights, observe its experts, quantize them, write a checkpoint, resume."""
