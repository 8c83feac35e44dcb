"""``python -m lightning_lora`` is ``python main.py``."""

import sys

from lightning_lora.cli import main

sys.exit(main())
