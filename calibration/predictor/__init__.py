"""Training the path predictor on recorded traces, and recording what it may see of a model."""
