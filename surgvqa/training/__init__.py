"""Trains an adapter: from the options to the adapter on disk."""
