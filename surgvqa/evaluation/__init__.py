"""Answers and their score."""
