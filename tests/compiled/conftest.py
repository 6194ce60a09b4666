import pytest
import triton

from bench.claimed import DRIVER


@pytest.fixture
def claimed_gpu(monkeypatch):
    """A driver that only claims to have a GPU: the just-in-time path goes on to launches that do nothing.

    The metadata and the arguments of every launch, as Triton hands them to a driver.
    """
    launches = []
    monkeypatch.setattr(triton.runtime.driver, "_active", DRIVER)
    monkeypatch.setattr(DRIVER, "launched", lambda *launch: launches.append(launch))
    return launches
