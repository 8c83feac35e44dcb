"""What a process is forked from that trains or evaluates: the code, imported, and what it is."""

import importlib

import torch

from lightning_lora.runs.folder import commit

if torch.cuda.is_available():
    # The rest, PEFT among it, imports bitsandbytes, which starts the GPU's driver: nothing may be forked after that.
    MODULES = ["lightning", "torchmetrics.classification", "transformers.modeling_utils", "tensorboard"]
else:
    MODULES = ["lightning_lora.commands.evaluate", "lightning_lora.commands.fit"]
for name in MODULES:
    importlib.import_module(name)
commit()
