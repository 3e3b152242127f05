"""The shipped models: how they are built and trained, and their weights."""
