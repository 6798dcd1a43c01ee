"""Requests and responses of the teacher server."""
