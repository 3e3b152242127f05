"""Our models in evaluation harnesses that others wrote."""
