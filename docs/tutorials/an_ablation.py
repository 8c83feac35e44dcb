# %% [markdown]
# # An ablation that a reviewer would believe
#
# How much rank does LoRA need on these texts? The question is written down before anything is run; every arm gets the same rows, seeds and
# budget; differences are paired by row and seed, with intervals and corrected p-values; and the report says what could not have been seen.

# %%
import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import yaml

ROWS = int(os.environ.get("ROWS", "400"))
# Commands are typed in the folder of the checkout.
if checkout := next((folder for folder in Path.cwd().parents if (folder / "main.py").is_file()), None):
    os.chdir(checkout)

# %% [markdown]
# ## The question, as a file
# `axes` are what is varied. Two settings under one axis change together: here alpha is twice the rank, so that the size of a step does not
# depend on it. `margin` is the difference that would not matter in practice.

# %%
ablation = {
    "question": "Does rank 8 do better than rank 1 on these reviews?",
    "base": str(Path("configs/default.yaml").resolve()),
    "settings": {
        "data.train_rows": ROWS,
        "data.val_size": ROWS // 4,
        "data.test_rows": ROWS,
        "data.max_length": 64,
        "trainer.max_epochs": 1,
    },
    "axes": {"rank": {"model.adapter.rank": [1, 8], "model.adapter.alpha": [2, 16]}},
    "baseline": {"rank": 8},
    "seeds": [1, 2, 3],
    "metric": "accuracy",
    "margin": 0.01,
}
Path("ranks.yaml").write_text(yaml.safe_dump(ablation, sort_keys=False))

# %% [markdown]
# ## The plan
# Nothing is trained yet. What an arm differs in beside its axis, a confounder, would be listed here.

# %%
subprocess.run("python main.py ablate --config ranks.yaml --name ranks --plan", shell=True, check=True)

# %% [markdown]
# ## Run it
# The same command again resumes what is missing; `--workers 2` shares the cells. Test rows are read once, at the end.

# %%
subprocess.run("python main.py ablate --config ranks.yaml --name ranks", shell=True, check=True)

# %% [markdown]
# ## Read it
# `logs/ranks/report.html` is the page to show; the same numbers are in `report.json`, `.csv`, `.tex` and `.md`.

# %%
report = json.loads(Path("logs/ranks/report.json").read_text())
table = pd.DataFrame(
    {
        "accuracy": {arm["name"]: arm["values"]["accuracy"] for arm in report["arms"]},
        "better than rank 8 by": {
            arm["name"]: arm["difference"]["estimate"]["mean"] for arm in report["arms"] if arm["difference"]
        },
        "verdict": {arm["name"]: arm["difference"]["verdict"] for arm in report["arms"] if arm["difference"]},
        "detectable": {arm["name"]: arm["difference"]["detectable"] for arm in report["arms"] if arm["difference"]},
    }
)
print(table)

# %% [markdown]
# - **inconclusive** does not mean equal. `detectable` is the smallest true difference that such an experiment would find in 8 of 10 cases: where it
#   is larger than what you care about, run more seeds or test on more rows; the report says how many.
# - **equivalent** is a claim of its own, with a test of its own: the difference is within the margin.
# - Seeds and rows are both samples. An interval over the rows of one seed says nothing of the next seed; one over three seeds' means says
#   nothing of other rows. The intervals here are over both.
# - Choosing a learning rate for each arm on the test rows would make the best-tuned arm win. Put it into a second axis with `chosen: true`: each arm
#   then takes its best value on validation rows.
