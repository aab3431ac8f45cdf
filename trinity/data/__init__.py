"""Documents made into batches."""
