"""Accuracy and fidelity against average bits: every method, uniform and mixed, beside the full-precision self."""
