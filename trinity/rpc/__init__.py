"""What callers and shards say to one another."""
