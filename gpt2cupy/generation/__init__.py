"""Generating: requests, the engine that runs them, prompts, and the text that comes out."""
