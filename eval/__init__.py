"""What judges: tasks, metrics, statistics, the runner and its report (``python -m eval``)."""
