"""One world for all attacks of a process."""

import pytest
import world as worlds


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return worlds.build(tmp_path_factory.mktemp("world"))
