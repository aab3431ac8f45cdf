"""Qwen3-MoE: Alibaba's Qwen3-30B-A3B, Qwen3-235B-A22B and their kin."""
