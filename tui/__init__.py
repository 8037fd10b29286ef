"""The panel: four screens over run folders. It owns no work and never imports torch."""
