"""The pages in a browser: the dashboard, and the one to try the model."""
