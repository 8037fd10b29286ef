"""Every setting: its default, where its value comes from, and the workspace it belongs to."""
