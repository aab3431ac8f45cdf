"""Adapters of low rank beside a model's frozen weights, in PEFT's file format."""
