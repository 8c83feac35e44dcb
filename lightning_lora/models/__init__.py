"""The base model with its head, and the methods of fine-tuning it."""
