"""`revfx bench`: revfx and what else there is, on the same models."""
