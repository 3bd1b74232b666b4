import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_stays_compiled() -> Iterator[None]:
    """Else the next test that adds a dropout is told that compiled code was thrown away."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
