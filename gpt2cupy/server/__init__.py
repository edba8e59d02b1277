"""The HTTP server: an engine process, front processes, and one that watches them."""
