"""A run folder read as it grows."""
