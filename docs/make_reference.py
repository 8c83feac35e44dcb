"""Write ``docs/reference.yaml``: every setting of ``fit`` with its help and default.

python docs/make_reference.py
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.config.options import COMMAND_KEYS

HEAD = """# Every setting of `python main.py fit` with its help and default (null: by method, source, rows or machine).
# Written by `python docs/make_reference.py`. Settings under `trainer` are those of lightning.Trainer.
"""


GROUPS = ("config", "model", "data", "trainer")


def reference() -> str:
    """The settings as YAML, each behind a comment with its help."""
    parser = ConfiguredRun("fit", ["--model.base_model", "BASE", "--data.source", "SOURCE"]).parser
    actions = {action.dest: action for action in parser._actions if action.help not in (None, "==SUPPRESS==")}
    lines: list[str] = []
    group: list[str] = []
    for key, action in actions.items():
        *parents, name = key.split(".")
        if (not parents and key in COMMAND_KEYS) or name in ("help", "print_config") or key in GROUPS:
            continue
        for depth, parent in enumerate(parents):
            if parents[: depth + 1] != group[: depth + 1]:
                lines.append(f"{'  ' * depth}{parent}:")
        group = parents
        indent = "  " * len(parents)
        told = " ".join(re.sub(r"\(type: .*", "", str(action.help), flags=re.DOTALL).split())
        if parents[:1] == ["trainer"]:  # of Lightning's own pages the first sentence
            told = re.split(r"(?<=\.)\s", told, maxsplit=1)[0]
        lines.append(f"{indent}# {told}")
        lines.append(f"{indent}{name}: {_shown(parser.get_defaults().get(key))}")
    return HEAD + "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or value == "":
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    Path(__file__).with_name("reference.yaml").write_text(reference(), encoding="utf-8")
