"""AFMoE: Arcee's Trinity models."""
