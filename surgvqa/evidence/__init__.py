"""`surgvqa evidence` and `publish`: packs, checks and uploads the evidence for a result."""
