"""Learning curves of the shipped models."""
