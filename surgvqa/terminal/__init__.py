"""What a person sees in a terminal: figures as text, bars, a job as it runs."""
