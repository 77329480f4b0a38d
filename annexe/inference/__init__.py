"""A trained model in use: the predictor, and the doors to it."""
