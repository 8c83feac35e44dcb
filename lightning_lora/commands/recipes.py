"""``main.py recipes``: the configs that come with this project."""

import shutil
import textwrap

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.config.options import CONFIGS, describe, recipes
from lightning_lora.errors import UserError
from lightning_lora.program import command_line


def run(argv: list[str]) -> int:
    """Print name, question and score of each config, or one config as it is."""
    parser = OptionParser("recipes", description="Lists the configs that --config finds by their names.")
    parser.add_argument("name", nargs="?", help="Print this one.")
    name, found = parser.parse_args(argv).name, recipes()
    if name is not None:
        if name not in found:
            raise UserError(f"no config '{name}'; there are {', '.join(found)}")
        print(found[name].read_text(encoding="utf-8"), end="")
        return 0
    width = max(60, shutil.get_terminal_size().columns)
    for name, path in found.items():
        command = "ablate" if path.is_relative_to(CONFIGS / "ablation") else "fit"
        command = "compare" if "\narms:" in path.read_text(encoding="utf-8") and command == "fit" else command
        print(command_line(command, "--config", name))
        for key, said in describe(path).items():
            labelled = said if key == "Question" else f"{key}: {said}"
            print(textwrap.fill(labelled, width, initial_indent="    ", subsequent_indent="    "))
    print(f"\nOne of them as it is: {command_line('recipes', 'NAME')}")
    return 0
