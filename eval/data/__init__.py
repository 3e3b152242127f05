"""ChartQA, ChartQA-X, DocVQA and InfographicVQA from files, in every layout in which they are handed around."""
