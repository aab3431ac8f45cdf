"""All expert shards of one model, as their users see them."""
