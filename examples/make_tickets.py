"""Writes a CSV of made-up support messages, to try this project on a file of one's own.

Usage: python examples/make_tickets.py tickets.csv [ROWS] [department | topics | days]

Each message has its department; or with "topics" none to three of them, as in "billing;delivery"; or with "days" how
long the customer has waited, in numbers and words.
"""

import csv
import random
import sys
from itertools import product
from pathlib import Path

OPENINGS = ("Hello,", "Hi there,", "Good morning,", "Dear team,", "Please help:", "")
CLOSINGS = ("Thanks.", "Please reply soon.", "I have been waiting since {day}.", "Order {number}.", "")
DAYS = ("Monday", "Tuesday", "last week", "yesterday", "the first of the month")
MESSAGES = {
    "billing": (
        "I was charged twice for {thing}",
        "the invoice for {thing} shows the wrong amount",
        "my card was refused when I paid for {thing}",
        "can I have the money for {thing} back",
    ),
    "delivery": (
        "the parcel with {thing} has not arrived",
        "{thing} came to the wrong address",
        "the box with {thing} was open when it came",
        "where is {thing} now, the tracking page does not change",
    ),
    "technical": (
        "{thing} does not switch on any more",
        "{thing} loses its connection every few minutes",
        "after the update {thing} shows only a blank screen",
        "how do I reset {thing}",
    ),
}
THINGS = ("the kettle", "my headphones", "the router", "the desk lamp", "my watch", "the speaker", "the printer")


def make_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different messages with their department, about a sixth of them filed under a wrong one.

    Args:
        count: How many; at most what the templates give.
        seed: Fixes the choice.
    """
    rng = random.Random(seed)
    rows = []
    for department, messages in MESSAGES.items():
        for opening, message, thing, closing in product(OPENINGS, messages, THINGS, CLOSINGS):
            text = f"{opening} {message.format(thing=thing)}. {closing}".strip()
            text = text.format(day=rng.choice(DAYS), number=rng.randint(10_000, 99_999))
            noisy = rng.random() < 0.25  # a quarter gets a random department, a third of them the right one
            rows.append((text, rng.choice(list(MESSAGES)) if noisy else department))
    rng.shuffle(rows)
    return rows[:count]


def make_others(count: int, kind: str, seed: int = 0) -> list[tuple[str, str]]:
    """Different messages with the departments that they are for, or with the days that somebody has waited.

    Args:
        count: How many.
        kind: "topics" or "days".
        seed: Fixes the choice.
    """
    rng, rows = random.Random(seed), dict[str, str]()
    units = {"days": 1, "weeks": 7, "months": 30}
    while len(rows) < count:
        topics = [each for each in MESSAGES if rng.random() < 0.4]
        number, unit = rng.randint(2, 11), rng.choice(list(units))
        parts = [rng.choice(MESSAGES[each]).format(thing=rng.choice(THINGS)) for each in topics]
        wait = f"I have been waiting for {number} {unit}"
        said = [*parts, wait, rng.choice(("Thanks", "Please reply soon"))]
        text = f"{rng.choice(OPENINGS)} {'. '.join(filter(None, said))}".strip()
        rows.setdefault(text, ";".join(topics) if kind == "topics" else str(number * units[unit]))
    return list(rows.items())


if __name__ == "__main__":
    kind = sys.argv[3] if len(sys.argv) == 4 else "department"
    if len(sys.argv) not in (2, 3, 4) or kind not in ("department", "topics", "days"):
        raise SystemExit(__doc__)
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 1200
    made = make_rows(rows) if kind == "department" else make_others(rows, kind)
    with Path(sys.argv[1]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["message", kind])
        writer.writerows(made)
    print(f"{len(made)} rows written to {sys.argv[1]}")
