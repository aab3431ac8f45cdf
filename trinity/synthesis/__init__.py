"""Synthetic data: passages of documents, asked of a model by templates, checked, without duplicates, with their provenance."""
