# %% [markdown]
# # Your own data, end to end
#
# From a CSV to a model that others can load: look at the data, train, test beside cheap baselines, predict, export.
# The file here is made up (support messages and the department they belong to); put yours in its place.

# %%
import os
import random
import subprocess
from pathlib import Path

import pandas as pd

ROWS = int(os.environ.get("ROWS", "900"))
# Commands are typed in the folder of the checkout.
if checkout := next((folder for folder in Path.cwd().parents if (folder / "main.py").is_file()), None):
    os.chdir(checkout)


def run(command: str) -> None:
    """Type a command; in a notebook `!command` does the same."""
    print(f"$ {command}")
    subprocess.run(command, shell=True, check=True)


# %%
random.seed(0)
parts = {
    "billing": ["I was charged twice for {}", "the invoice for {} is wrong", "please refund {}"],
    "delivery": ["{} has not arrived", "{} came to the wrong address", "where is {} now"],
    "technical": ["{} does not switch on", "{} shows a blank screen", "how do I reset {}"],
}
things = ["the kettle", "my headphones", "the router", "the desk lamp", "my watch", "order"]
rows = []
for number in range(ROWS):
    department = random.choice(list(parts))
    text = random.choice(parts[department]).format(f"{random.choice(things)} {number}")
    rows.append({"message": text, "department": department})
pd.DataFrame(rows).to_csv("messages.csv", index=False)
pd.read_csv("messages.csv").head()

# %% [markdown]
# ## Train
# Without more words: test and validation rows are carved and stratified, duplicates across splits are taken out, the length of training follows the
# number of rows. With `--model.pooling first` the head reads the first token, as transformers' own classifiers do, so that a pipeline can load it
# (MiniLM by itself reads the mean of all, which the code in the model card loads). Everything that was used is in `logs/messages/config.yaml`, what came of it in `run.json`.

# %%
run(
    "python main.py fit --config configs/experiment/own_csv.yaml --data.source messages.csv "
    "--data.text_column message --data.label_column department --model.pooling first --name messages"
)

# %% [markdown]
# ## Test, beside a bag of words
# `before` is the base model with a fresh head. If `tfidf` is as good, use it: it costs nothing.

# %%
run("python main.py test --run logs/messages --baselines true")

# %% [markdown]
# ## Look at mistakes

# %%
test = pd.read_parquet("logs/messages/predictions/test.parquet")
test["prediction"] = test.filter(like="logit(").idxmax(axis=1).str[6:-1]
wrong = test[test["prediction"] != test["label"]]
print(f"{len(wrong)} of {len(test)} wrong")
print(pd.crosstab(test["label"], test["prediction"]))

# %% [markdown]
# ## Predict
# From Python, and for files: `python main.py predict --run logs/messages --input new.csv --text_column message --output labels.csv`.

# %%
from lightning_lora import load_run

loaded = load_run("logs/messages")
found = loaded.predict(["My parcel is still not here.", "The screen stays black."])
print(pd.DataFrame(found.columns()))

# %% [markdown]
# ## Hand it on
# As a PEFT adapter, and merged for plain `transformers`; each is compared with the trained model before it is called done. The folder has a model card.

# %%
run("python main.py export --run logs/messages --formats '[adapter,merged]'")
from transformers import pipeline

classify = pipeline("text-classification", "logs/messages/export/merged")
print(classify("My parcel is still not here."))
assert classify("My parcel is still not here.")[0]["label"] == found.names[0]
