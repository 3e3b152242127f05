"""How well predictors foretell recorded routes, in all and on the misses that a cache leaves."""
