"""The GPU memory of training and generation: predicted, fitted to a budget, and given up step by step."""
