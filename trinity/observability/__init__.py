"""Measurements and where they go: the log of a run, and the names of all Prometheus metrics."""
