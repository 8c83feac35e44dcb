"""An ablation over several data sets: each is an ablation of its own, as arms are paired on the same rows.

    sets:
      reviews: {data.source: imdb_packaged, data.train_rows: 1000}
      tickets: {data.source: tickets.csv}

Beside settings a set may have a base, a metric and published figures of its own.

Imports no torch.
"""

from collections.abc import Mapping
from typing import Any

from lightning_lora.experiments.plan import flatten
from lightning_lora.experiments.search_space import require
from lightning_lora.runs.folder import folder_name

#: Keys of an ablation that a set may have of its own.
OWN_KEYS = ("base", "metric", "published")


def split_sets(content: Mapping[str, Any], small: bool, wanted: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the config of each set's ablation, by the set's name.

    Args:
        content: The config, with ``sets``: settings by name, and ``OWN_KEYS``.
        small: Whether the small size is asked for; its ``sets`` are a list of names.
        wanted: The names that are asked for; by default those of the size.

    Raises:
        UserError: The sets are not described as above, or a name is unknown.
    """
    described = content["sets"]
    require(isinstance(described, dict) and described, "sets: settings by name are needed")
    own, sets = {}, {}
    for name, given in described.items():
        require(isinstance(given, dict | None), f"sets.{name}: settings are needed, such as {{data.source: rows.csv}}")
        own[str(name)] = {key: value for key, value in (given or {}).items() if key in OWN_KEYS}
        settings = {key: value for key, value in (given or {}).items() if key not in OWN_KEYS}
        sets[str(name)] = flatten(settings, f"sets.{name}")
    for name in sets:
        require(folder_name(name, "sets") == name, f"sets: '{name}' cannot be a folder's name")
    rest = {key: value for key, value in content.items() if key != "sets"}
    names = list(sets)
    if isinstance(rest.get("small"), dict) and "sets" in rest["small"]:
        rest["small"] = dict(rest["small"])
        fewer = rest["small"].pop("sets")
        require(isinstance(fewer, list) and {*fewer} <= {*names}, f"small.sets: a list of {', '.join(names)} is needed")
        names = fewer if small else names
    for name in wanted or []:
        require(name in sets, f"--sets: there is no set '{name}'; there are {', '.join(sets)}")
    common = flatten(rest.get("settings"))
    return {name: {**rest, **own[name], "settings": common | sets[name]} for name in wanted or names}
