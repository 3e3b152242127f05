"""The page of a comparison: one file, nothing loaded from elsewhere, readable in light and dark."""
