"""Jobs of Ray Data: the only place that says `ray.data`."""
