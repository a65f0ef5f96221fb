"""Regions run in eager mode: their operations, what is freed and regenerated, and what is compared."""
