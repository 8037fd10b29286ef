"""The `surgvqa` command line."""
