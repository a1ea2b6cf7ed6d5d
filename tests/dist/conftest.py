import pytest

from tests.dist.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks(8)
    yield pool
    pool.close()
