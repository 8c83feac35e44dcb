"""What a process is forked from that trains or evaluates: the code, imported, and what it is."""

import importlib

import torch

from lightning_lora.fingerprint import code_fingerprint
from lightning_lora.runs.folder import commit

MODULES = ["pandas", "torch.utils.tensorboard"]
if torch.cuda.is_available():
    # PEFT imports bitsandbytes, which starts the GPU's driver, and nothing may be forked after that. Much of the time
    # of these imports is torch's compiler, which bitsandbytes imports, and which does not.
    MODULES += ["lightning", "torchmetrics.classification", "transformers.modeling_utils", "torch._inductor.compile_fx"]
    MODULES += ["lightning_lora.data.datamodule", "lightning_lora.evaluation.metrics"]
else:
    MODULES += ["lightning_lora.commands.evaluate", "lightning_lora.commands.fit"]
for name in MODULES:
    importlib.import_module(name)
if not torch.cuda.is_available():
    from lightning_lora.config.settings import make_parser

    for command in ("fit", "validate", "test"):
        make_parser(command)
commit()
code_fingerprint("data.stored")
