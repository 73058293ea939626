"""Components of a tiny pipeline."""

from typing import Any

import pytest
from tiny import components


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """Components that no test may change."""
    return components()
