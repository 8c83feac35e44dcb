"""Clients of a server (a locustfile): each asks for one text after the other and checks its answer.

Started by ``benchmarks/serving.py``, which writes the texts and what ``predict`` says of each to the file that
``LOAD_TEXTS`` names. An answer with another text's probability is counted as a failure.
"""

import json
import os
from itertools import count
from pathlib import Path

from locust import FastHttpUser, task

LOAD = json.loads(Path(os.environ["LOAD_TEXTS"]).read_text(encoding="utf-8"))
_CLIENTS = count()


class TextClient(FastHttpUser):
    """A client that sends its next text when the answer to the one before has come."""

    def on_start(self) -> None:
        """Begin with another text than the other clients."""
        self.at = 37 * next(_CLIENTS)

    @task
    def predict(self) -> None:
        """Ask for one text."""
        self.at = (self.at + 1) % len(LOAD["texts"])
        body, expected = {"texts": [LOAD["texts"][self.at]]}, LOAD["expected"][self.at]
        with self.client.post("/predict", json=body, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            found = answer.json()["predictions"][0]["probabilities"]
            if any(abs(found[name] - p) > LOAD["tolerance"] for name, p in expected.items()):
                answer.failure("another answer than predict's")
