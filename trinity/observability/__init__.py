"""What is measured and where it goes: the log of a run, and the names of all Prometheus metrics."""
