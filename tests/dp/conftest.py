"""Small kernels over several threads are fifty times slower where another process has the other core."""

import pytest
import torch

from tests.dp.ledgers import made


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path):
    """A new ledger of north."""
    return made(tmp_path)
