"""The command `expertflow-quant`."""
