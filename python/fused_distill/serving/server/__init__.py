"""The teacher server."""
