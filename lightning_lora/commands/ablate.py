"""``main.py ablate``: an experiment that a config describes, and its report."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.commands.report import write_ablation_report, write_sets_report
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.config.options import find_config
from lightning_lora.config.settings import read_config
from lightning_lora.errors import UserError
from lightning_lora.experiments.resolving import split_sets
from lightning_lora.experiments.runner import add_options, run_experiment
from lightning_lora.runs.folder import folder_name


def run(argv: list[str]) -> int:
    """Run what is missing of an ablation and write its report; return 1 if a cell failed."""
    parser = OptionParser(
        "ablate",
        description="Trains the cells of an ablation, tests once, and writes the report. The same command again "
        "resumes. Every other option is one of fit's, for all cells.",
    )
    parser.add_argument("-c", "--config", required=True, help="The ablation: a file, or a name that recipes lists.")
    parser.add_argument("--small", action="store_true", help="The small size that the config describes.")
    parser.add_argument("--name", help="The folder under --logs_dir; by default ablation-CONFIG.")
    parser.add_argument("--sets", nargs="+", help="Of an ablation over several data sets: those to run now.")
    parser.add_argument(
        "--arms", nargs="+", help="Of the arms that the config, or its base recipe, names: those to run now."
    )
    add_options(parser)
    options, overrides = parser.parse_known_args(argv)
    parser.refuse_misspelt(overrides)
    if any(word.startswith("--seed_everything") for word in overrides):
        raise UserError("--seed_everything: the seeds of an ablation are those of its config")
    path = find_config(options.config)
    name = f"ablation-{path.stem}{'-small' if options.small else ''}"
    folder = Path(options.logs_dir) / (folder_name(options.name) if options.name else name)
    content, command = read_config(path), ["ablate", *argv]
    if "sets" not in content:
        if options.sets:
            raise UserError(f"--sets: {path} describes no sets")
        return run_one(content, path, folder, options, overrides, command)
    sets = split_sets(content, options.small, options.sets)
    status = 0
    for number, (each, own) in enumerate(sets.items(), 1):
        print(f"\n== set {number} of {len(sets)}: {each}", flush=True)
        status |= run_one(own, path, folder / each, options, overrides, command)
    if not options.plan:
        write_sets_report(folder)
    return status


def run_one(content: Mapping[str, Any], path: Path, folder: Path, options: Namespace, *more: Any) -> int:
    """Run what is missing of an ablation and write its report; with ``--plan`` only print what would be run."""
    status = run_experiment(content, path, folder, options, *more)
    if not options.plan:
        write_ablation_report(folder)
    return status
