"""The run folder: everything that a job and its watchers share."""
