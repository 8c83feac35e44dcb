"""The peer of ``benchmarks/gpu.py``: transformers' Trainer with PEFT, on the same rows and shapes."""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_common import CUDA, EPOCH, Bench, synchronize

#: Recipes of the Trainer: whether with all that it offers for speed.
TUNED = {"Trainer, tuned": True, "Trainer, common": False}


class PeerClock:
    """When the Trainer had done a fifth of its steps, and the last."""

    @staticmethod
    def make(steps: int) -> Any:
        """The callback."""
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            def __init__(self) -> None:
                self.skip, self.times = max(1, steps // 5), list[float]()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in (self.skip, steps):
                    synchronize()
                    self.times.append(time.perf_counter())

        return Clock()


def peer_model(bench: "Bench", tuned: bool, size: str = "roberta-base") -> Any:
    """What a script of transformers and PEFT trains."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(bench.base(size), num_labels=4)
    if tuned:
        model.to(torch.bfloat16)
        model.classifier.float()
    dropout = 0.0 if tuned else 0.1
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["query", "value"]
    )
    return get_peft_model(model, lora)


def peer(bench: "Bench", model: Any, rows: int, batch_size: int, tuned: bool) -> tuple[Any, Any, int]:
    """The Trainer, its rows and the number of its steps."""
    from datasets import Dataset
    from transformers import Trainer as HFTrainer
    from transformers import TrainingArguments

    data = bench.rows(rows)
    ids = [data.input_format.inputs(data.tokens[i])[0] for i in range(rows)]
    table = Dataset.from_dict({"input_ids": ids, "labels": data.labels, "length": data.lengths})

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        width = -(-longest // 8) * 8 if tuned else 128
        tokens, mask = torch.full((len(batch), width), 1), torch.zeros((len(batch), width), dtype=torch.long)
        for i, row in enumerate(batch):
            tokens[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}

    arguments = TrainingArguments(
        output_dir=str(Path(bench.folder) / "peer"),
        num_train_epochs=1,
        learning_rate=5e-4,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=256 if tuned else 16,
        bf16=tuned and CUDA,
        bf16_full_eval=tuned and CUDA,
        train_sampling_strategy="group_by_length" if tuned else "random",
        length_column_name="length",
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=6 if tuned and CUDA else 0,
        dataloader_drop_last=True,
        optim="adamw_torch_fused",
        use_cpu=not CUDA,
    )
    steps = rows // batch_size
    trainer = HFTrainer(model=model, args=arguments, train_dataset=table, data_collator=collate)
    return trainer, table, steps


def peer_training(bench: "Bench", batch_size: int, rows: int, tuned: bool) -> dict[str, Any]:
    """As ``own_training``."""
    trainer, _, steps = peer(bench, peer_model(bench, tuned), rows, batch_size, tuned)
    clock = PeerClock.make(steps)
    trainer.add_callback(clock)
    trainer.train()
    each = (clock.times[-1] - clock.times[0]) / (steps - clock.skip)
    return {"step_ms": each * 1e3, "epoch_s": each / batch_size * EPOCH}
