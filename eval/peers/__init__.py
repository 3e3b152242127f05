"""Output errors of other quantizers on the same weights and samples: each runs in an environment of its own."""
