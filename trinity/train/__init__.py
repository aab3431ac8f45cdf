"""The training loop of one worker and what it is made of."""
