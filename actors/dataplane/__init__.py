"""Tensors between callers and shards: shared memory, sockets, Ray calls."""
