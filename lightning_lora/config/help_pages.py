"""The help of commands that are configured like a run: their own options first, all settings by ``--help_all``."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from lightning_lora.config.run_options import COMMAND_KEYS, COMMON_SETTINGS, EXAMPLES


def show_help(command: str, parser: Any, words: Sequence[str]) -> None:
    """Prints the help page that the words ask for, if any, and ends the process."""
    if "--help_all" in words:
        parser.print_help()
    elif {"-h", "--help"} & set(words):
        print(help_page(command, parser), end="")
    else:
        return
    sys.exit(0)


def help_page(command: str, parser: Any) -> str:
    """Usage and examples, the command's own options, and for fit the settings that are changed most."""
    actions = {action.dest: action for action in parser._actions}
    positional = " ['TEXT' ...]" if "texts" in actions else ""
    page = argparse.ArgumentParser(
        prog=parser.prog,
        usage=f"{parser.prog} [OPTIONS]{positional}",
        description="examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[command]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every setting of a run is an option too: --help_all lists them, --print_config shows their values.",
        add_help=False,
    )
    own = page.add_argument_group("options")
    for name, action in actions.items():
        if name in COMMAND_KEYS:
            _add(own, action)
    own.add_argument("--print_config", action="store_true", help="Print the settings with their values and stop.")
    own.add_argument("-h", "--help", action="store_true", help="Show this page.")
    own.add_argument("--help_all", action="store_true", help="Show every setting.")
    if command == "fit":
        common = page.add_argument_group("settings that are changed most")
        for name in COMMON_SETTINGS:
            _add(common, actions[name], short=True)
    return page.format_help()


def _add(group: Any, action: Any, short: bool = False) -> None:
    told = " ".join((action.help or "").split())
    if short:  # the first sentence
        told = re.split(r"(?<=\.) (?=[A-Z])", told)[0]
    shown = action.default not in (None, False, "==SUPPRESS==") and action.dest != "texts"
    words = f"{told}{f' (default: {action.default})' if shown else ''}".replace("%", "%%")
    if not action.option_strings:
        group.add_argument(action.dest, nargs="*", metavar="TEXT", help=words)
    else:
        metavar = action.metavar or action.dest.rpartition(".")[2].upper()
        names = [name for name in action.option_strings if not name.endswith("+")]
        group.add_argument(*names, metavar=metavar, help=words)
