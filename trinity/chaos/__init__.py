"""Training and serving under faults on purpose, with a report of how they came through."""
