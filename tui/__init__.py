"""The panel: five screens over run folders. It owns no work and never imports torch."""
