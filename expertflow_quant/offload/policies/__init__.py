"""Policies beyond the least recently used one; each sees ids, counts and scores only (offload/policy.py)."""
