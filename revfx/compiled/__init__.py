"""Whole-graph compilation: the backend, the partitioner, and compiled functions."""
