"""Fusions made for this one model: its embedding, and a step as one kernel."""
