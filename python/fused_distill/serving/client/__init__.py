"""The client of a teacher server."""
