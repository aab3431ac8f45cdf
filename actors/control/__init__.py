"""The placement service: what should be, what is, and the changes between them."""
