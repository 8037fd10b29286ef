"""Where jobs run: this machine or a GPU host, behind one interface."""
