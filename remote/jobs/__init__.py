"""Jobs on a GPU host: launched, followed, stopped, fetched."""
