import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget


class ClaimedDriver:
    """The few questions that compilation asks a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.fixture
def claimed_gpu(monkeypatch):
    """A driver that only claims to have a GPU: the just-in-time path goes as far as the launch."""
    monkeypatch.setattr(triton.runtime.driver, "_active", ClaimedDriver())
