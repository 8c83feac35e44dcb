from pathlib import Path

import torch

from lightning_lora.evaluation.costs import parameter_counts, peak_memory_mb
from lightning_lora.models.base import load_base
from lightning_lora.models.methods import AdapterOptions, tune


def test_parameters_are_counted_without_pefts_spare_copy_of_the_head(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), ["a", "b"], 0)
    plain = sum(p.numel() for p in base.model.parameters())
    model = tune(base, "lora", AdapterOptions(), 0, False).model
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    counts = parameter_counts(model)
    assert counts == {"trainable_params": adapter + 2 * 32 + 2, "total_params": plain + adapter}
    assert model.get_nb_trainable_parameters()[0] == counts["trainable_params"]


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory_mb()["peak_memory_mb"]
    block = torch.ones(int(before + 200) * 2**18)  # more than the peak so far
    assert peak_memory_mb()["peak_memory_mb"] > before + 150
    del block
