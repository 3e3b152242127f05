"""What the token scheduler is worth: experts that batches touch, with and without it."""
