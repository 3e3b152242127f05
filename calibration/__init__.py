"""What looks at data to decide: recipes of the shipped models, plans."""
