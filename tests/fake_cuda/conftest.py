import pytest

import fake_gpu

fake_gpu.claim()


@pytest.fixture
def gpu():
    with fake_gpu.gpu() as here:
        yield here
