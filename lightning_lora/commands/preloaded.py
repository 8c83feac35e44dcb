"""What a process is forked from that trains or evaluates: the code, imported, and what it is."""

from lightning_lora.artifacts.runs import commit
from lightning_lora.commands import evaluate, fit

__all__ = ["evaluate", "fit"]

commit()
