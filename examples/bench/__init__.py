"""The bench: revfx and its rivals, on the same models."""
