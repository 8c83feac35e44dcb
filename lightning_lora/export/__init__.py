"""Formats for other software, each checked for parity, with a model card."""
