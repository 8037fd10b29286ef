"""The `surgvqa-remote` command line."""
