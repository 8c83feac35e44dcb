"""Fine-tune text classifiers with LoRA on PyTorch Lightning.

Data flows one way: config -> data -> model -> training -> evaluation -> runs -> reports.
"""

import logging

__version__ = "0.1.0"

# Said at its import, before any command can hold it back: a kernel that nobody asked for is not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
