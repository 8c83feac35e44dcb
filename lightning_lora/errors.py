"""The one exception that a user can cause."""


class UserError(Exception):
    """Something in the input is wrong: shown as one line, without a traceback.

    The message names the file, row, column or key, what came, what is allowed and what to do.
    """
