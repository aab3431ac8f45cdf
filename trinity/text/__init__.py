"""Tokenizers, chat templates, and text as it is generated."""
