"""The host's side: travels as source and runs under the host's own Python, standard library only."""
