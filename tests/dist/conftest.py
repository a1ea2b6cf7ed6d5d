import pytest

from tests.dist.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    return Ranks()
