"""What judges: tasks, metrics, statistics, the runner and its report. Run from a checkout: ``python -m eval``."""
