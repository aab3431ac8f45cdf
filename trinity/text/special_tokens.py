"""The special tokens of the family, in the order of their ids."""

BOS, EOS, PAD = "<|begin_of_text|>", "<|im_end|>", "<|pad|>"


MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


SPECIALS = (BOS, "<|end_of_text|>", "<|im_start|>", EOS, *MARKERS, "<|reserved_10|>", "<|reserved_11|>", PAD)
