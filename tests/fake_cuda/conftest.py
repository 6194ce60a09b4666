import pytest

import fake_gpu

fake_gpu.claim()  # before a test asks whether there is a GPU


@pytest.fixture
def gpu():
    with fake_gpu.gpu() as here:
        yield here
