"""The tests that need a GPU, run as a figure: which passed, on what, and which there was no time for."""
