"""The way from a layer's tokens to the shards that hold their experts, and back."""
