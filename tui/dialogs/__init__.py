"""Screens over a screen: a question, the keys, the hosts."""
