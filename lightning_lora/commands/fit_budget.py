"""``main.py fit --budget``: search the settings that were left open within a time, and keep the best run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.config.settings import split_fit
from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import METRICS, primary_metric
from lightning_lora.experiments.search_space import import_optuna
from lightning_lora.experiments.tuning import Tuner, budget_seconds, changes_words, scores_of
from lightning_lora.experiments.tuning_space import make_space
from lightning_lora.program import command_line
from lightning_lora.reports.tables import markdown
from lightning_lora.runs.folder import TUNING, RunFolder, folder_name, plain_stem
from lightning_lora.units import duration


def tune(cli: ConfiguredRun, argv: list[str], stem: str, started: float) -> None:
    """Search the settings that were left open within a time, and keep the run that is best on validation rows.

    Args:
        cli: The command line, parsed.
        argv: What stands after the command.
        stem: What a run without a name is called after.
        started: When the command began, by ``time.monotonic``.

    Raises:
        UserError: The time is none, the name is taken, or there is nothing to search.
    """
    config = cli.config
    budget_s = budget_seconds(config.budget)
    if cli.count_devices() > 1:
        raise UserError("--budget: trials run on one device each; leave trainer.devices and num_nodes out")
    configs, options, typed = split_fit(argv)
    key = hashlib.sha256(json.dumps([cli.settings(), sorted(typed), budget_s], default=str).encode()).hexdigest()[:8]
    name = folder_name(config.name) if config.name else plain_stem(f"{stem}-budget-{key}")
    folder = Path(config.logs_dir) / name
    if folder.exists() and ((folder / "config.yaml").is_file() or not (folder / TUNING).is_file()):
        RunFolder.create(folder.parent, name, "")  # which refuses it
    import_optuna()  # before the data is read
    space = make_space(configs, options, typed)
    command = command_line("fit", *argv)
    print(f"search within {duration(budget_s)}: {folder}; over {', '.join(space.dimensions)}", flush=True)
    record = Tuner(space, folder, budget_s, config.seed_everything, command, tuning_page, started).run().read()
    rows, metric = record["data"]["splits"]["val"]["rows"], primary_metric(space.task)[1]
    print(f"\nkept: {kept_words(record['tuning'])}")
    biased = f"chosen on {rows:,} validation rows, which its {metric} is optimistically biased on"
    print(f"{biased}; test rows played no part")
    print(f"run folder: {folder} (what was tried: tuning.md)")
    print(f"next: {command_line('test', '--run', folder)}")


def kept_words(tuning: Mapping[str, Any]) -> str:
    """Return which trial was kept, beside the default."""
    default, kept = tuning["trials"][0], tuning["trials"][tuning["kept"]]
    words = f"trial {kept['number']} of {len(tuning['trials'])} ({changes_words(kept['settings'])}), "
    name, heading = primary_metric(tuning.get("task", "single_label"))
    words += f"validation {heading} {kept[name]:.4f}"
    if kept is default:
        return words
    return f"{words}; the default has {default[name]:.4f}" if name in default else f"{words}; the default failed"


def tuning_page(tuning: Mapping[str, Any]) -> str:
    """Return ``tuning.md`` of what a record has under ``tuning``."""
    names = scores_of(tuning.get("task", "single_label"))
    rows = [["trial", "differs from the default", *(METRICS[name].heading for name in names), "seconds", "status"]]
    for trial in tuning["trials"]:
        scores = [f"{trial[name]:.4f}" if name in trial else "" for name in names]
        status = f"failed: {trial['reason']}" if "reason" in trial else trial["status"]
        status += ", stopped by the time left" if trial.get("stopped_by_time") else ""
        status += ", kept" if trial["number"] == tuning["kept"] else ""
        changed = changes_words(trial["settings"])
        rows.append([str(trial["number"]), changed, *scores, f"{trial['seconds']:.1f}", status])
    told = f"Budget {duration(tuning['budget_s'])}, used {duration(tuning['used_s'])}. Kept: {kept_words(tuning)}."
    judged = "All figures are of validation rows, by which the kept trial was chosen: those of it are optimistic."
    return f"# Search within a time\n\n{told}\n\n{judged} Test rows played no part.\n\n{markdown(rows)}\n"
