"""Rules that parts without a model need to know by name, such as how experts are initialised."""
