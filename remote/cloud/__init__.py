"""Renting machines: what a provider offers, what we rented, and how each machine ends."""
