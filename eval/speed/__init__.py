"""How fast a model runs and what bounds it: systems side by side, with the ceilings measured in the same run."""
