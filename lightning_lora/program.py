"""How this program is started, for help pages and for messages that say what to type."""

import shlex
import sys
from pathlib import Path

#: The folder of a checkout, or of the packages of an environment that a wheel was installed into.
ROOT = Path(__file__).parents[1]


def program() -> str:
    """Return what stands before a command: as it was typed, or else as it can be."""
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("lightning_lora", "__main__.py"):
        return "python -m lightning_lora"
    return "python main.py" if started.name != "lightning-lora" and (ROOT / "main.py").is_file() else "lightning-lora"


def install_line(extra: str) -> str:
    """Return the line that installs an extra of this project: in a checkout with its pinned versions."""
    checkout = (ROOT / "main.py").is_file()
    return f"pip install -c constraints.txt -e '.[{extra}]'" if checkout else f"pip install 'lightning_lora[{extra}]'"


def command_line(*words: object) -> str:
    """Return the line that runs a command of this program in a shell."""
    return f"{program()} {shlex.join(map(str, words))}"
