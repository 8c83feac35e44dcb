"""The exceptions that a user can cause, and warnings."""

import math
import sys
from collections.abc import Sequence


class UserError(Exception):
    """Something in the input is wrong: shown as one line, without a traceback.

    The message names the file, row, column or key, what came, what is allowed and what to do.
    """

    #: The exit status of a command that it ends.
    status = 2


class BusyError(UserError):
    """Another process is at it: trying again later may help (EX_TEMPFAIL of sysexits.h)."""

    status = 75


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of what an exception says, cut to ``limit`` characters, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def print_warnings(warnings: Sequence[str]) -> None:
    """Prints each on a line of standard error that begins with "warning:"."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def check_range(key: str, value: float, low: float, high: float | None) -> None:
    """Refuses a number under ``low``, or of ``high`` or more."""
    if not (math.isfinite(value) and value >= low) or (high is not None and value >= high):
        limits = f"of at least {low}" if high is None else f"from {low} up to {high}"
        raise UserError(f"{key}: a number {limits} is needed, got {value}")
