"""Prepares data for training and evaluation. No torch; numpy only for speech."""
