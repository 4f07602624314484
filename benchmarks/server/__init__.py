"""A real server: its start, front end, load and typed answers."""
