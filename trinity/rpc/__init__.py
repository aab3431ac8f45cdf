"""Messages between callers and shards."""
