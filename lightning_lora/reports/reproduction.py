"""Stored figures beside those that came out now: which differ, and by how much. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A figure that was not there to be compared counts as one that differs.
DIFFERING = ("differs", "missing")


@dataclass(frozen=True)
class Figure:
    """One stored figure.

    Args:
        run: The run's folder under the table's own.
        path: Where it stands in the run's record, such as ``evaluations.test.after.accuracy``.
        stored: Its value.
        within: How far off it may be, or the lowest and highest value that count as the same; None where it is only
            shown, as times are, which depend on the machine and the hour.
    """

    run: str
    path: str
    stored: float
    within: float | tuple[float, float] | None


@dataclass(frozen=True)
class Compared:
    """A figure and what it is now.

    Args:
        table: Name of its table.
        figure: What was stored.
        now: Its value now; None where there is none.
    """

    table: str
    figure: Figure
    now: float | None

    @property
    def difference(self) -> float | None:
        """Now less stored."""
        return None if self.now is None else self.now - self.figure.stored

    @property
    def verdict(self) -> str:
        """ "same", "differs", "missing", or "shown" where it is not judged."""
        within = self.figure.within
        if self.now is None:
            return "missing"
        if within is None:
            return "shown"
        low, high = within if isinstance(within, tuple) else (self.figure.stored - within, self.figure.stored + within)
        room = 1e-9 * max(1.0, abs(self.figure.stored))  # what decimal numbers lose as binary ones
        return "same" if low - room <= self.now <= high + room else "differs"

    @property
    def allowed(self) -> str:
        """What counts as the same, in words."""
        within = self.figure.within
        if within is None:
            return "not judged"
        return f"{_number(within[0])} to {_number(within[1])}" if isinstance(within, tuple) else f"± {_number(within)}"


def look_up(record: Mapping[str, Any], path: str) -> float | None:
    """A number of a run record by its keys joined by dots, which keys may hold themselves; None where there is none."""
    if path in record:
        value = record[path]
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    for key, inner in record.items():
        if path.startswith(f"{key}.") and isinstance(inner, Mapping):
            found = look_up(inner, path[len(key) + 1 :])
            if found is not None:
                return found
    return None


def table(compared: Sequence[Compared]) -> list[list[str]]:
    """A header, then a row for each figure."""
    rows = [["table", "run", "figure", "stored", "now", "difference", "same if", "verdict"]]
    for each in compared:
        figure, now, by = each.figure, each.now, each.difference
        shown = ["-" if now is None else _number(now), "-" if by is None else _number(by, signed=True)]
        verdict = f"**{each.verdict}**" if each.verdict in DIFFERING else each.verdict
        rows.append([each.table, figure.run, figure.path, _number(figure.stored), *shown, each.allowed, verdict])
    return rows


def summary(compared: Sequence[Compared]) -> list[str]:
    """What differs, a line each; one line where nothing does."""
    judged = [each for each in compared if each.verdict != "shown"]
    odd = [each for each in judged if each.verdict in DIFFERING]
    said = []
    for each in odd:
        what = f"{each.table}, {each.figure.run}: {each.figure.path}"
        if each.now is None:
            said.append(f"{what} is missing; stored is {_number(each.figure.stored)}")
        else:
            by, stored = _number(each.difference or 0.0, signed=True), _number(each.figure.stored)
            said.append(f"{what} differs by {by}: stored {stored}, now {_number(each.now)} (same if {each.allowed})")
    same = len(judged) - len(odd)
    return [*said, f"{same} of {len(judged)} figures are the same; {len(compared) - len(judged)} are only shown"]


def _number(value: float, signed: bool = False) -> str:
    sign = "+" if signed and value else ""
    if float(value).is_integer() and abs(value) != 1:  # a count; a share of 1 is not
        return f"{value:{sign},.0f}"
    return f"{round(value, 4) + 0.0:{sign},.4f}"  # never -0.0000
