"""Terminal output: figures as text, bars, and the view of a running job."""
