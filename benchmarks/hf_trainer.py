"""The peer: the usual way to do this job, transformers' Trainer with PEFT, as a script of its own.

It shares no code with this project. One call trains, predicts the validation and the test rows, and writes a JSON
file with what it cost. Two recipes: "common" as in most tutorials (float32, every text padded to the limit, 16 a
batch), "tuned" with everything that the Trainer offers for speed; it evaluates with the batch size and attention that
are fastest on the validation rows.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


class Clock(TrainerCallback):
    """When the first step began and ended (Unix time), and when training ended."""

    def __init__(self) -> None:
        self.first_step_begins = self.first_step_ends = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """The first one counts."""
        self.first_step_begins = self.first_step_begins or time.time()

    def on_step_end(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """The first one counts."""
        self.first_step_ends = self.first_step_ends or time.time()


def predict(trainer: Trainer, rows: Dataset, split: str, tuned: bool) -> dict[str, float]:
    """Accuracy on the rows and the seconds of the pass alone: its loader, which counts lengths, is made before."""
    loader = trainer.get_test_dataloader(rows.sort("length", reverse=True) if tuned else rows)
    started = time.time()
    predicted = trainer.evaluation_loop(loader, description="Prediction")
    seconds = time.time() - started
    # With length grouping the Trainer also predicts in another order than that of the rows; its labels go with it.
    accuracy = float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))
    return {f"{split}_s": seconds, f"{split}_accuracy": accuracy, f"{split}_rows": len(rows)}


def dropout(base: float | None) -> dict[str, float]:
    """Settings of a BERT model's config; that of the head stays 0.1."""
    if base is None:
        return {}
    return {"hidden_dropout_prob": base, "attention_probs_dropout_prob": base, "classifier_dropout": 0.1}


def main() -> None:
    """Trains, predicts, writes ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", choices=("common", "tuned"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of train, validation and test parquet files")
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; checkpoints go beside it")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--base_dtype", default="float32", help="number format of the frozen weights")
    parser.add_argument("--base_dropout", type=float, help="of the frozen encoder; by default its own")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no_test", action="store_true", help="predict the validation rows only")
    options = parser.parse_args()
    tuned = options.recipe == "tuned"
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    files = {split: str(options.data / f"{split}.parquet") for split in ("train", "validation", "test")}
    data = load_dataset("parquet", data_files=files)

    def encode(rows):  # type: ignore[no-untyped-def]
        padding = False if tuned else "max_length"
        encoded = tokenizer(rows["text"], truncation=True, max_length=options.max_length, padding=padding)
        return encoded | ({"length": [len(ids) for ids in encoded["input_ids"]]} if tuned else {})

    data = data.map(encode, batched=True, remove_columns=["text"])
    model = AutoModelForSequenceClassification.from_pretrained(
        options.base_model,
        num_labels=len(data["train"].unique("label")),
        attn_implementation=options.attention,
        dtype=getattr(torch, options.base_dtype),
        ignore_mismatched_sizes=True,
        **dropout(options.base_dropout),
    )
    model.classifier.float()  # it is trained
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, lora)

    work = options.out.with_suffix("")
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=0.06,
        weight_decay=0.01,
        per_device_train_batch_size=options.batch_size or (32 if tuned else 16),
        per_device_eval_batch_size=64 if tuned else 16,
        bf16=tuned,
        bf16_full_eval=tuned,
        train_sampling_strategy="group_by_length" if tuned else "random",
        torch_compile=options.compile,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8) if tuned else default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    trained = time.time()
    report = {
        "train_rows": len(data["train"]) * options.epochs,
        "train_s": trained - clock.first_step_begins,
        "first_step_at": clock.first_step_ends,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "checkpoint_bytes": sum(f.stat().st_size for f in work.rglob("*") if f.is_file()),
        "adapter_bytes": max(f.stat().st_size for f in work.rglob("adapter_model.safetensors")),
    }
    report |= predict(trainer, data["validation"], "validation", tuned)
    if not options.no_test:
        speeds = {}
        for attention in ("sdpa", "eager") if tuned else ():
            for batch_size in (32, 64):
                model.get_base_model().set_attn_implementation(attention)
                arguments.per_device_eval_batch_size = batch_size
                for _ in range(2):  # the first pass meets each shape anew
                    tried = predict(trainer, data["validation"], "validation", tuned)
                speeds[attention, batch_size] = tried["validation_s"]
        if speeds:
            attention, arguments.per_device_eval_batch_size = min(speeds, key=lambda setting: speeds[setting])
            model.get_base_model().set_attn_implementation(attention)
            report |= {"eval_attention": attention, "eval_batch_size": arguments.per_device_eval_batch_size}
        report |= predict(trainer, data["test"], "test", tuned)
    options.out.write_text(json.dumps(report | {"torch_threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
