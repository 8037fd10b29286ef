"""A training run from its options to the adapter on disk."""
