"""The run folder: everything that a job and its readers share."""
