"""Jobs over files, as Ray Data runs them: plain classes of `trinity`, and a line each."""
