"""The command table and the border where errors become one line.

A command is one entry here and one module in ``commands/``, or a plugin: a distribution with an entry point in the
group ``lightning_lora.commands``, whose summary is the line of the help page. Nothing heavy is imported before a
command is chosen.
"""

import difflib
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from lightning_lora import __version__
from lightning_lora.errors import UserError, first_line
from lightning_lora.files import refusal
from lightning_lora.interrupts import Interrupted
from lightning_lora.processes import is_rank_zero
from lightning_lora.program import ROOT, program

#: For each word after ``main.py`` a line for the help page, and the ``module:function`` that takes the other arguments.
COMMANDS = {
    "data": ("what the data is, what is suspicious first", "data:run"),
    "fit": ("train; without --config the embedded default", "fit:run"),
    "validate": ("metrics of a run on its validation rows", "evaluate:validate"),
    "test": ("metrics before and after, on the test rows", "evaluate:test"),
    "compare": ("train and test several arms on the same rows: one table", "compare:run"),
    "export": ("adapter, merged model and ONNX for other software", "export:run"),
    "sample": ("random test rows with truth and prediction", "sample:run"),
    "explain": ("what each word adds to a prediction, and labels that are likely wrong", "explain:run"),
    "ablate": ("an ablation: axes, seeds, sound comparison, report", "ablate:run"),
    "report": ("the report of ablations or of any runs, without torch", "report:run"),
    "recipes": ("the configs that --config finds by name", "recipes:run"),
    "predict": ("labels and probabilities for your own texts", "predict:run"),
}
#: Commands of plugins of this project: the distribution of each.
PLUGINS = {"demo": "lightning_lora_demo", "serve": "lightning_lora_serve"}
#: Seconds that a process waits for the one that leads it.
PATIENCE_S = 10


def help_page() -> str:
    """What ``--help`` shows: each command with a line, those of installed plugins last."""
    lines = {name: summary for name, (summary, _) in COMMANDS.items()}
    lines |= {name: point.dist.metadata["Summary"] for name, point in plugin_commands().items() if point.dist}
    return f"""usage: {program()} COMMAND [OPTIONS]

Fine-tune text classifiers with LoRA on PyTorch Lightning.

{chr(10).join(f"  {name:<8}  {summary}" for name, summary in lines.items())}

Each command has its own --help; --print_config shows every setting with its value.
Errors are one line; --traceback (or LIGHTNING_LORA_TRACEBACK=1) shows where they come from."""


def plugin_commands() -> dict[str, EntryPoint]:
    """The commands that installed plugins bring, by name."""
    return {point.name: point for point in sorted(entry_points(group="lightning_lora.commands"))}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a fault, 2 for a wrong input, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Large pages for large tensors (4% of a step on a CPU); torch reads it before its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    show_traceback = "--traceback" in argv or bool(os.environ.get("LIGHTNING_LORA_TRACEBACK"))
    argv = [word for word in argv if word != "--traceback"]
    if not argv or argv[0] in ("-h", "--help"):
        print(help_page())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"lightning_lora {__version__}")
        return 0
    return exit_status(lambda: _run_command(*argv), show_traceback)


def _run_command(command: str, *argv: str) -> int | None:
    if _starts_children(command, argv):
        from lightning_lora.children import start_server

        start_server()  # first, so that it imports while this process does
    return _function(command)(list(argv))


def _function(command: str) -> Callable[[list[str]], int | None]:
    if command in COMMANDS:
        return pkgutil.resolve_name(f"lightning_lora.commands.{COMMANDS[command][1]}")
    plugins = plugin_commands()
    if command in plugins:
        return plugins[command].load()
    if command in PLUGINS:
        checkout = f"-c constraints.txt -e plugins/{command}" if (ROOT / "main.py").is_file() else PLUGINS[command]
        raise UserError(f"the command '{command}' is a plugin: pip install {checkout}")
    known = [*COMMANDS, *plugins]
    meant = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(command, known, 1))
    raise UserError(f"no command '{command}'{meant}; there are {', '.join(known)}")


def _starts_children(command: str, argv: Sequence[str]) -> bool:
    if {"-h", "--help", "--help_all", "--plan"} & set(argv):
        return False
    return command in ("ablate", "compare") or bool({"--budget", "--workers"} & {w.partition("=")[0] for w in argv})


def exit_status(work: Callable[[], int | None], show_traceback: bool = False) -> int:
    """Call a function and return the exit status that its end means; an error becomes one line on standard error.

    Args:
        work: The function; what it returns is the status, None means 0.
        show_traceback: Print where an error comes from, too.
    """
    try:
        try:
            return work() or 0
        except (Interrupted, UserError):
            if not is_rank_zero():  # launchers end all once one has ended, and rank zero has a record to write
                time.sleep(PATIENCE_S)
            raise
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
    except BrokenPipeError:  # whoever reads what is printed has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        refused = refusal(error) if isinstance(error, OSError) else None
        if isinstance(error, UserError) or refused is not None:
            print(f"error: {refused or error}", file=sys.stderr)
            return error.status if isinstance(error, UserError) else 2
        # Not foreseen: a fault of this program, or of the machine; still one line, and the record has it too.
        said = f"{type(error).__name__}: {first_line(error)}"
        print(f"error: {said} (--traceback shows where it comes from)", file=sys.stderr)
        return 1
