"""What the panel says, as rich text: no widget, no state."""
