"""Make the collection importable."""

import tests.collection  # noqa: F401
