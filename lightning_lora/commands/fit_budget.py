"""``main.py fit --budget``: search the settings that were left open within a time, and keep the best run."""

import hashlib
import json
import shlex
from pathlib import Path

from lightning_lora.commands.fit_output import print_tuning, tuning_page
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.config.settings import split_fit
from lightning_lora.errors import UserError
from lightning_lora.experiments.search_space import import_optuna
from lightning_lora.experiments.tuning import Tuner, budget_seconds
from lightning_lora.experiments.tuning_space import make_space
from lightning_lora.runs.folder import TUNING, RunFolder, folder_name, plain_stem
from lightning_lora.units import duration


def tune(cli: ConfiguredRun, words: list[str], stem: str, started: float) -> None:
    """Search the settings that were left open within a time, and keep the run that is best on validation rows.

    Args:
        cli: The command line, parsed.
        words: The same.
        stem: What a run without a name is called after.
        started: When the command began, by ``time.monotonic``.

    Raises:
        UserError: The time is none, the name is taken, or there is nothing to search.
    """
    config = cli.config
    budget_s = budget_seconds(config.budget)
    if cli.count_devices() > 1:
        raise UserError("--budget: trials run on one device each; leave trainer.devices and num_nodes out")
    configs, options, typed = split_fit(words)
    key = hashlib.sha256(json.dumps([cli.settings(), sorted(typed), budget_s], default=str).encode()).hexdigest()[:8]
    name = folder_name(config.name) if config.name else plain_stem(f"{stem}-budget-{key}")
    folder = Path(config.logs_dir) / name
    if folder.exists() and ((folder / "config.yaml").is_file() or not (folder / TUNING).is_file()):
        RunFolder.create(folder.parent, name, "")  # which refuses it
    import_optuna()  # before the data is read
    space = make_space(configs, options, typed)
    command = shlex.join(["python", "main.py", "fit", *words])
    print(f"search within {duration(budget_s)}: {folder}; over {', '.join(space.dimensions)}", flush=True)
    run = Tuner(space, folder, budget_s, config.seed_everything, command, tuning_page, started).run()
    print_tuning(run)
