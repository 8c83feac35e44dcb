"""``main.py compare``: an experiment whose arms are fine-tuning methods, or settings under ``arms:`` in a config."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_lora.commands.ablate import run_one
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.config.options import DEFAULT_CONFIG, find_config
from lightning_lora.config.settings import DEFAULT_SEED, default_config, read_config, typed_source
from lightning_lora.errors import UserError
from lightning_lora.experiments.plan import ARM
from lightning_lora.experiments.runner import add_options
from lightning_lora.models.methods import BASELINES, METHODS, AdapterOptions, find_method
from lightning_lora.models.quantization import Quantization
from lightning_lora.runs.folder import folder_name

DEFAULT_ARMS = ("none", "head", "lora", "full")
#: What may follow a method's name after a hyphen, and the setting that it means.
STORED: dict[str, dict[str, Any]] = {
    "": {},
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4"},
}


def run(argv: list[str]) -> int:
    """Run what is missing of the arms and write the report; return 1 if an arm failed."""
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    parser.refuse_misspelt(overrides)
    paths = [find_config(each) for each in options.config or [DEFAULT_CONFIG]]
    configs = [read_config(path) for path in paths] if options.config else [default_config(typed_source(overrides))]
    described = [config.pop("arms") for config in configs if "arms" in config]
    arms = choose_arms(options.arms, described[-1] if described else None)
    seeds = [config.pop("seed_everything") for config in configs if "seed_everything" in config]
    key = hashlib.sha256(json.dumps([configs, overrides], sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder = Path(options.logs_dir) / (folder_name(options.name) if options.name else f"compare-{paths[-1].stem}-{key}")
    content = {
        "question": f"How do {', '.join(arms)} compare on the same rows, in the same order, from the same head?"
        if len(arms) > 1
        else f"How good is {next(iter(arms))}?",
        "arms": arms,
        "baseline": {ARM: options.baseline or next(iter(arms))},
        "seeds": options.seed_everything or seeds[-1:] or [DEFAULT_SEED],
    }
    return run_one(content, folder / "comparison.yaml", folder, options, overrides, ["compare", *argv], configs)


def choose_arms(names: Sequence[str] | None, described: Any) -> dict[str, dict[str, Any]]:
    """Return the settings in which each arm differs from the config, by name.

    Args:
        names: Of the command line: keys of ``described``, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4;
            None means all that are described, or else ``DEFAULT_ARMS``.
        described: The config's ``arms``: a mapping of names to settings.

    Raises:
        UserError: A name is none of these, or is given twice.
    """
    described = {} if described is None else described
    if not isinstance(described, dict) or not all(isinstance(v or {}, dict) for v in described.values()):
        raise UserError("arms: a mapping of each arm's name to its settings is needed")
    described = {str(name): change or {} for name, change in described.items()}  # a rank may be a name
    wanted = list(names or described or DEFAULT_ARMS)
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--arms: '{next(n for n in wanted if wanted.count(n) > 1)}' is given twice")
    arms = {}
    for name in wanted:
        method, _, stored = name.partition("-")
        if name in described:
            arms[folder_name(name, "arms")] = described[name]
        elif method in METHODS | BASELINES and stored in STORED:
            arms[name] = {"model": method_settings(method, STORED[stored])}
        else:
            raise UserError(
                f"--arms: no arm '{name}'; there are {', '.join([*described, *METHODS, *BASELINES])}, and a method "
                f"followed by -{', -'.join(filter(None, STORED))}"
            )
    return arms


def method_settings(method: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make any config one of a method: what the method does not take has its default."""
    entry = find_method(method)
    settings: dict[str, Any] = {"method": method}
    if reset := {option.name: option.default for option in fields(AdapterOptions) if option.name not in entry.options}:
        settings["adapter"] = reset
    settings["quantization"] = {option.name: option.default for option in fields(Quantization)} | dict(quantization)
    return settings | ({} if entry.frozen_encoder else {"frozen_dropout": False})


def _parser() -> OptionParser:
    parser = OptionParser(
        "compare",
        description="Trains and tests several arms on the same rows and reports them like an ablation. The same "
        "command again does only what is missing. Every other option is one of fit's, for all arms.",
    )
    described = "As for fit, and as often; may hold 'arms': each name with its settings."
    parser.add_argument("-c", "--config", action="append", help=described)
    parser.add_argument(
        "--arms",
        nargs="+",
        help="Arms of the config, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4 with a method of "
        f"{', '.join(METHODS | BASELINES)}; by default those of the config, or {' '.join(DEFAULT_ARMS)}.",
    )
    parser.add_argument("--baseline", help="The arm that the others are compared with; by default the first.")
    parser.add_argument("--seed_everything", nargs="+", type=int, help="Seeds; with several, differences are judged.")
    parser.add_argument("--name", help="The folder under --logs_dir; by default made from the settings.")
    add_options(parser)
    parser.set_defaults(small=False)
    return parser
