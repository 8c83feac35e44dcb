"""What a process is forked from that trains or evaluates: the code, imported, and what it is."""

import importlib

from lightning_lora.runs.folder import commit

for command in ("evaluate", "fit"):
    importlib.import_module(f"lightning_lora.commands.{command}")
commit()
