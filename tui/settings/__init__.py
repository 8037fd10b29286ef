"""The settings that the panel edits, and what follows from them before a job starts."""
