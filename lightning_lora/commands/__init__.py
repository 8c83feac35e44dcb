"""What a person types: one module a command, listed in ``lightning_lora/cli.py``."""
