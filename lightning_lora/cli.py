"""The command table and the border where errors become one line.

A command is one entry here and one module in ``commands/``. Nothing heavy is imported before a command is
chosen.
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from lightning_lora import __version__
from lightning_lora.errors import UserError
from lightning_lora.files import refusal
from lightning_lora.interrupts import Interrupted


@dataclass(frozen=True)
class Command:
    """One word after ``main.py``.

    Args:
        summary: One line for the help page.
        target: ``module:function``; the function takes the remaining words.
    """

    summary: str
    target: str


COMMANDS: dict[str, Command] = {
    "fit": Command("train; without --config the embedded default", "lightning_lora.commands.fit:run"),
    "validate": Command("metrics of a run on its validation rows", "lightning_lora.commands.evaluate:validate"),
    "test": Command("metrics before and after, on the test rows", "lightning_lora.commands.evaluate:test"),
    "compare": Command(
        "train and test several arms on the same rows: one table", "lightning_lora.commands.compare:run"
    ),
    "export": Command("adapter, merged model and ONNX for other software", "lightning_lora.commands.export:run"),
    "sample": Command("random test rows with truth and prediction", "lightning_lora.commands.sample:run"),
    "ablate": Command("an ablation: axes, seeds, sound comparison, report", "lightning_lora.commands.ablate:run"),
    "report": Command("the report of ablations or of any runs, without torch", "lightning_lora.commands.report:run"),
    "predict": Command("labels and probabilities for your own texts", "lightning_lora.commands.predict:run"),
}

USAGE = "usage: python main.py COMMAND [OPTIONS]"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a fault, 2 for a wrong input, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Large pages for large tensors (4% of a step on a CPU); torch reads it before its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    show_traceback = "--traceback" in words or bool(os.environ.get("LIGHTNING_LORA_TRACEBACK"))
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(help_page())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning_lora {__version__}")
        return 0
    return exit_status(lambda: _run_command(words), show_traceback)


def _run_command(words: list[str]) -> int | None:
    if words[0] not in COMMANDS:
        meant = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f"did you mean {meant[0]}? There" if meant else "there"
        raise UserError(f"no command '{words[0]}'; {hint} are {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[words[0]].target.partition(":")
    return getattr(importlib.import_module(module), function)(words[1:])


def exit_status(work: Callable[[], int | None], show_traceback: bool = False) -> int:
    """Call a function and return the exit status that its end means; an error becomes one line on standard error.

    Args:
        work: The function; what it returns is the status, None means 0.
        show_traceback: Print where an error comes from, too.
    """
    try:
        return work() or 0
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except Interrupted as error:
        return error.status
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into SystemExit(1), which callers could not tell from a failure.
        if type(error).__name__ == "SIGTERMException":
            return 143
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and (said := refusal(error)) is not None:
            print(f"error: {said}", file=sys.stderr)
            return 2
        # Not foreseen: a fault of this program, or of the machine; still one line, and the record has it too.
        if show_traceback:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"error: {type(error).__name__}: {first} (--traceback shows where it comes from)", file=sys.stderr)
        return 1


def help_page() -> str:
    """What ``main.py --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "Fine-tune text classifiers with LoRA on PyTorch Lightning.",
            "",
            *lines,
            "",
            "Each command has its own --help; --print_config shows every setting with its value.",
            "Errors are one line; --traceback (or LIGHTNING_LORA_TRACEBACK=1) shows where they come from.",
        ]
    )
