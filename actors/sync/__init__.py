"""Freshness of a process's knowledge: placement, weights, and state that outlives a process."""
