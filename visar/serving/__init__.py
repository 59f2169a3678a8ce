"""Requests of many clients, decoded together: an engine in its own thread, and an HTTP server in front of it."""
