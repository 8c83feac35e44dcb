"""The core's fixtures."""

from tests.conftest import make_base, own_folders, tiny_base  # noqa: F401
from tests.inference.conftest import place  # noqa: F401
