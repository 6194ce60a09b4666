"""A driver for Triton that claims to have a GPU. Triton compiles and goes on to the launch, which does nothing."""

import torch
from triton.backends.compiler import GPUTarget


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}


class ClaimedDriver:
    """The few questions that compilation and a launch ask a driver."""

    utils = _Utils()

    def launched(self, metadata, *arguments) -> None:
        """In place of every launch: of a kernel with this metadata, with what Triton hands a driver."""

    def launcher_cls(self, src, metadata):
        # Triton keeps it with the kernel, so `launched` is looked up at every launch.
        return lambda *arguments: self.launched(metadata, *arguments)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


DRIVER = ClaimedDriver()
