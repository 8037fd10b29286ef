"""Answers samples with a model and scores the answers."""
