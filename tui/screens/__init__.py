"""Merge, Upload, Train and Monitor."""
