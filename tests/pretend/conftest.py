"""One process with the pretended device for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretend.backend import usable
from pretend.server import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if not usable():
        pytest.skip("the pretended device needs Linux and a CPU build of torch")
    with serving() as started:
        yield started
