"""The GPU memory of training and generation: predicts it, fits it to a budget, and steps down when it runs out."""
