"""What keeps a process's knowledge fresh: placement, weights, and state that outlives a process."""
