"""Two processes that run the same function at once, in one group of torch.distributed: each on a GPU, or on the CPU."""

import contextlib
import datetime
import os
import tempfile
import traceback

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

COUNT = 2
# Long, for the machine may be busy: what hangs still fails.
PATIENCE = datetime.timedelta(seconds=240)


def device(rank: int) -> torch.device:
    """NCCL takes one process per GPU."""
    return torch.device("cuda", rank) if torch.cuda.device_count() >= COUNT else torch.device("cpu")


def _serve(rank: int, folder: str, connection) -> None:
    """Run what comes until nothing more comes."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # TF32 has an accuracy of its own
    own = device(rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/group", rank=rank, world_size=COUNT, timeout=PATIENCE
    )
    for function, args in iter(connection.recv, None):
        torch.manual_seed(0)
        try:
            connection.send((function(own, *args), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
    dist.destroy_process_group()
    os._exit(0)  # the interpreter would take seconds to end


class Processes:
    """The processes live as long as the context, for they take seconds to start."""

    def __enter__(self) -> "Processes":
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        ends = [context.Pipe() for _ in range(COUNT)]
        self._connections = [own for own, _ in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, self._folder.name, other), daemon=True)
            for rank, (_, other) in enumerate(ends)
        ]
        for process in self._processes:
            process.start()
        for _, other in ends:
            other.close()  # so that the end of a process ends the wait for it
        return self

    def __exit__(self, *_) -> None:
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # of a process that has ended
                connection.send(None)
        for process in self._processes:
            process.join(60)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def run(self, function, *args) -> list:
        """`function(device, *args)` in every process. Returns what each returned, which holds no tensors on a GPU.

        The function must be one of a module in tests/helpers, which the processes can import.
        """
        for connection in self._connections:
            connection.send((function, args))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE.total_seconds()):
                raise TimeoutError(f"process {rank} did not answer: {function.__name__}")
            result, error = connection.recv()
            if error is not None:
                raise AssertionError(f"process {rank}: {error}")
            results.append(result)
        return results
