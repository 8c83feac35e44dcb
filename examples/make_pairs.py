"""Writes a CSV of made-up pairs of support messages and whether both are about the same thing, to try pairs with.

Usage: python examples/make_pairs.py pairs.csv [ROWS]
"""

import csv
import random
import sys
from itertools import chain
from pathlib import Path

from make_tickets import MESSAGES, THINGS

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    rng, rows = random.Random(0), {}
    templates = list(chain.from_iterable(MESSAGES.values()))
    while len(rows) < (int(sys.argv[2]) if len(sys.argv) == 3 else 1200):
        about = [rng.choice(THINGS)] * 2 if len(rows) % 2 else rng.sample(THINGS, 2)
        pair = tuple(rng.choice(templates).format(thing=thing) for thing in about)
        rows[pair] = "same" if about[0] == about[1] else "other"
    with Path(sys.argv[1]).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("first", "second", "label"), *((*pair, label) for pair, label in rows.items())])
    print(f"{len(rows)} rows written to {sys.argv[1]}")
