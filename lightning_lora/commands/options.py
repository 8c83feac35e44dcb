"""The parser of commands that are not configured like a run. Imports no torch."""

import argparse
from typing import Any, NoReturn

from lightning_lora.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose faults are one line, and whose options are written whole.

    Args:
        command: The word after ``main.py``.
        options: Of ``argparse.ArgumentParser``.
    """

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"main.py {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong.

        Raises:
            UserError: Always.
        """
        raise UserError(message)
