"""Tokens a second of this project on one device, with nothing to download.

    python benchmarks/throughput.py --size roberta-base --rows 120000       (on a GPU)
    python benchmarks/throughput.py --size minilm --rows 512                (on a CPU)

Random weights of the right shape and random tokens, with lengths drawn like those of AG News, trained for one epoch by
the project's own module, batches and Lightning's Trainer. Prints tokens a second, the share of the matrix-product rate
that was measured on the same device just before, and seconds an epoch.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Tokens of AG News' training texts (5,998 of them, BERT's word pieces, special tokens included): every 5th percentile.
LENGTHS = [19, 31, 36, 39, 41, 43, 44, 46, 48, 49, 51, 52, 54, 55, 57, 59, 62, 65, 70, 81, 299]
#: Shapes: model type, and what differs from its default config.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514}),
    "minilm": ("bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "tiny": ("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}),
}


#: The config of other architectures.
SMALL: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
MORE: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 256},
    "electra": {"embedding_size": 64},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 514},
    "xlm-roberta": {"pad_token_id": 1, "max_position_embeddings": 514},
    "camembert": {"pad_token_id": 1, "max_position_embeddings": 514},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 128},
}


def make_base(size: str, folder: Path, **more: Any) -> Path:
    """A base model with random weights: of a size, or a small one of a model type, with changes to its config."""
    from transformers import AutoConfig, AutoModel

    kind, changes = SIZES.get(size, (size, SMALL | MORE.get(size, {})))
    config = AutoConfig.for_model(kind, **changes | more)
    for name, value in {"num_key_value_heads": config.num_attention_heads, "head_dim": 64}.items():
        if size not in SIZES and hasattr(config, name):  # of language models
            setattr(config, name, value)
    if config.pad_token_id is None:
        config.pad_token_id = 1
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def make_rows(rows: int, max_length: int, length: int | None = None, seed: int = 0, top: int = 20000) -> Any:
    """Random tokens as the project's data set, with the lengths of AG News, or all of one length."""
    import pyarrow as pa

    from lightning_lora.data.batching import TokenDataset
    from lightning_lora.data.tokens import InputFormat, TokenRows

    draw = np.random.default_rng(seed)
    lengths = np.interp(draw.random(rows), np.linspace(0, 1, len(LENGTHS)), LENGTHS).astype(np.int64) - 2
    if length is not None:
        lengths[:] = length - 2
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)))
    ids = draw.integers(1000, top, offsets[-1], dtype=np.int32)
    input_format = InputFormat(prefix=(0,), suffix=(2,), pad_id=1, max_length=max_length)
    tokens = TokenRows(pa.chunked_array([pa.ListArray.from_arrays(offsets, ids)]))
    return TokenDataset(tokens, input_format, draw.integers(0, 4, rows), pad_to_max=False)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating-point operations a second of a large square matrix product."""
    side = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    count, synchronize = 0, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < seconds:
        for _ in range(10):
            left @ right
        count += 10
        synchronize()
    return count * 2 * side**3 / took


def encoder_flops(model: torch.nn.Module) -> float:
    """Floating-point operations a token, forward and backward, of the encoder's frozen linear layers.

    2 a weight forward and 2 backward: frozen weights need no gradient. Adapters and attention scores are not counted,
    nor what is computed for the first token of a text only: behind the last attention, and the pooler.
    """
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "lora_" in name or module.weight.requires_grad:
            continue
        behind = getattr(module, "first_token_only", False) and ".attention.self." not in name
        count += 0 if behind or ".pooler." in name else module.weight.numel()
    return 4.0 * count


def main() -> None:
    """Trains one epoch and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="roberta-base")
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--batch_by", choices=("texts", "tokens"), default="texts")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--length", type=int, help="tokens of every text, instead of AG News' lengths")
    parser.add_argument("--targets", default="query_value")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    from lightning import Trainer

    from lightning_lora.config.console import quiet_libraries
    from lightning_lora.data.batching import LengthBatchSampler
    from lightning_lora.data.datamodule import make_loader
    from lightning_lora.devices import auto_precision, keep_freed_memory
    from lightning_lora.evaluation.costs import CostMeter, peak_memory_mb
    from lightning_lora.models.methods import AdapterOptions
    from lightning_lora.training.module import TextClassifier

    quiet_libraries()
    keep_freed_memory()
    precision = auto_precision("auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device, torch.bfloat16 if precision.startswith("bf16") else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(options.size, Path(folder))
        adapter = AdapterOptions(rank=options.rank, target_modules=options.targets)
        model = TextClassifier(str(base), ["a", "b", "c", "d"], adapter=adapter)
    data = make_rows(options.rows, max(options.max_length, options.length or 0), options.length)
    loader = make_loader(data, LengthBatchSampler(data.lengths, options.batch_size, 1, by=options.batch_by))
    meter = CostMeter()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    fit: Any = Trainer(max_epochs=1, precision=precision, callbacks=[meter], gradient_clip_val=1.0, devices=1, **quiet)  # type: ignore[arg-type]
    fit.fit(model, loader)
    if device.type == "cuda":
        torch.cuda.synchronize()
    costs = meter.costs() | peak_memory_mb()
    flops = encoder_flops(model.model)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "size": options.size,
        "rows": options.rows,
        "batch_size": options.batch_size,
        "batch_by": options.batch_by,
        "rank": options.rank,
        "length": options.length,
        "precision": precision,
        "matrix_product_tflops": rate / 1e12,
        "tokens_per_s": costs["train_tokens_per_s"],
        "share_of_matrix_rate": costs["train_tokens_per_s"] * flops / rate,
        "epoch_s": costs["train_s"],
        **{name: value for name, value in costs.items() if name.startswith("peak")},
    }
    for name, value in report.items():
        print(f"{name:<24} {value:,.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
