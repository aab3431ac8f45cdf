"""Small things about the operating system that several packages need."""
