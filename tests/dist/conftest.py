import pytest

from tests.dist.ranks import Ranks


@pytest.fixture(scope="module")  # every job leaves threads of its gloo groups behind: new processes for a new module
def ranks():
    pool = Ranks(8)
    yield pool
    pool.close()
