"""The connection to a GPU host: which host, its keys, the agent at the other end."""
