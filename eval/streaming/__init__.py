"""How much memory quantizing a model takes that is larger than memory."""
