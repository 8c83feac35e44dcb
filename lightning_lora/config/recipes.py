"""The configs that come with this project, beside the package in a checkout and inside it in a wheel."""

import re
from pathlib import Path

from lightning_lora.program import ROOT

_IN_WHEEL = Path(__file__).parents[1] / "configs"
CONFIGS = _IN_WHEEL if _IN_WHEEL.is_dir() else ROOT / "configs"
DEFAULT_CONFIG = CONFIGS / "default.yaml"


def recipes() -> dict[str, Path]:
    """Return the path of each config by its name: "default", "imdb_bert", and of ablations "rank"."""
    found = {"default": DEFAULT_CONFIG}
    for folder in (CONFIGS / "experiment", CONFIGS / "ablation"):
        found |= {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return found


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: a path, or the name or the path of a config of this project."""
    path = Path(name)
    if path.exists():
        return path
    shipped = CONFIGS.parent / path
    return shipped if path.parts[:1] == ("configs",) and shipped.is_file() else recipes().get(name, path)


def describe(path: Path) -> dict[str, str]:
    """Return what the head of a config says: its ``Question``, and where it is one of ``fit``'s its ``Score``."""
    lines, said, key = path.read_text(encoding="utf-8").splitlines(), dict[str, str](), ""
    for line in lines:
        if found := re.match(r"#? ?([A-Za-z]+): +(.*)", line):
            key = found[1].capitalize()
            said.setdefault(key, found[2])
        elif line.startswith("#    ") and key:
            said[key] += f" {line[1:].strip()}"
        else:
            key = ""
    return {name: said[name] for name in ("Question", "Score") if name in said}
