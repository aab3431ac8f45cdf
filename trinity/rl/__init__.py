"""Samples from live weights, and steps from rewards."""
