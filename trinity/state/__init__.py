"""Versions of named tensors that outlive a process."""
