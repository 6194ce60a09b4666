"""What tests of torch.distributed run in several processes, and alone to compare. A process takes its share of a batch.

The sizes are odd, so no parameter divides by two.
"""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedlstm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
T, B, I, H = 4, 8, 3, 7
# With larger steps LayerNormLSTM makes tens of thousands of roundings out of one, in one process too.
RATE = 0.1
LENGTHS = (4, 0, 3, 4, 1, 4, 2, 3)


class Case(NamedTuple):
    """A model and how it is trained."""

    name: str = "LSTM"
    lengths: bool = False
    steps: int = 20
    backend: str = "auto"
    layers: int = 1
    of_torch: bool = False  # whether torch.nn has the layer, in place of ours
    spare: bool = False  # whether there is a layer that no call uses
    momentum: float = 0.0


class Net(nn.Module):
    """A layer and a head; the call returns the loss, which is a mean over the sequences."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        make = nn if case.of_torch else fusedlstm
        options = {} if case.of_torch else {"backend": case.backend}
        self.layer = getattr(make, case.name)(I, H, case.layers, **options)
        self.head = nn.Linear(H, 3)
        if case.spare:
            self.spare = fusedlstm.GRU(I, H)

    def forward(self, x: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        output, _ = self.layer(x) if lengths is None else self.layer(x, lengths=lengths)
        return (self.head(output).float() - target).square().mean()


def net(case: Case, dtype: torch.dtype = torch.float32) -> Net:
    """The same numbers in every process and dtype."""
    torch.manual_seed(1)
    return Net(case).to(dtype)


def batch(case: Case, dtype: torch.dtype, share: slice = slice(None)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x, target = (torch.randn(T, B, n, generator=generator) for n in (I, 3))
    lengths = (torch.tensor(LENGTHS)[share],) if case.lengths else ()
    return x[:, share].to(dtype), target[:, share].to(torch.promote_types(dtype, torch.float32)), *lengths


def own_share(parts: int = 1, part: int = 0) -> slice:
    """The sequences of this process, or one of equal parts of them."""
    size = B // dist.get_world_size() // parts
    begin = size * (parts * dist.get_rank() + part)
    return slice(begin, begin + size)


def train(model: nn.Module, data: tuple[Tensor, ...], case: Case) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=case.momentum)
    for _ in range(case.steps):
        optimizer.zero_grad()
        model(*data).backward()
        optimizer.step()
    return optimizer


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole copies, on the CPU."""
    return {name: _whole(p) for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.grad) for name, p in model.named_parameters()}


def _whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x.clone()).cpu()


def alone(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights after the training of one process on the whole batch."""
    model = net(case, dtype)
    train(model, batch(case, dtype), case)
    return weights(model)


def alone_gradients(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    model = net(case, dtype)
    model(*batch(case, dtype)).backward()
    return gradients(model)


# In every process: `device` is its own.


def _moved(device: torch.device, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in data)


def _replicated(device: torch.device, model: nn.Module, **options) -> DistributedDataParallel:
    return DistributedDataParallel(model.to(device), **options)


def sharded(device: torch.device, model: Net, policy: MixedPrecisionPolicy | None = None) -> Net:
    model.to(device)
    for module in (model.layer, model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


def replicated(device: torch.device, case: Case, compiled: bool = False) -> dict[str, Tensor]:
    model = net(case)
    wrapped = _replicated(device, model, find_unused_parameters=case.spare)
    if compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    train(wrapped, _moved(device, batch(case, torch.float32, own_share())), case)
    return weights(model)


def accumulated(device: torch.device, case: Case) -> dict[str, Tensor]:
    """Two calls per step; the gradients of the first are not exchanged."""
    model = net(case)
    wrapped = _replicated(device, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(case.steps):
        optimizer.zero_grad()
        for part in (0, 1):
            with wrapped.no_sync() if part == 0 else contextlib.nullcontext():
                (wrapped(*_moved(device, batch(case, torch.float32, own_share(2, part)))) / 2).backward()
        optimizer.step()
    return weights(model)


def sharded_weights(device: torch.device, case: Case) -> dict[str, Tensor]:
    model = sharded(device, net(case))
    train(model, _moved(device, batch(case, torch.float32, own_share())), case)
    return weights(model)


def sharded_gradients(device: torch.device, case: Case) -> dict[str, Tensor]:
    """Of a call that computes in bfloat16, and sums gradients in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(device, net(case), policy)
    model(*_moved(device, batch(case, torch.float32, own_share()))).backward()
    return gradients(model)


def saved(device: torch.device, case: Case, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save after a training; returns the weights, and those after another training."""
    model = sharded(device, net(case))
    data = _moved(device, batch(case, torch.float32, own_share()))
    optimizer = train(model, data, case)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    before = weights(model)
    _resume(model, optimizer, data)
    return before, weights(model)


def loaded(case: Case, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same from the file, alone and without a group."""
    model = net(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=case.momentum)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    before = weights(model)
    _resume(model, optimizer, batch(case, torch.float32))
    return before, weights(model)


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, ...], steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(*data).backward()
        optimizer.step()


# Of examples/.


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained_example(_: torch.device, arguments: list[str]) -> str:
    """What examples/data_parallel.py prints."""
    data_parallel = example("data_parallel")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        data_parallel.train(data_parallel.parsed(arguments))
    return printed.getvalue()


def compared_heads(device: torch.device) -> str:
    """What examples/heads_over_processes.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example("heads_over_processes").compare(device)
    return printed.getvalue()


def heads_apart(device: torch.device, name: str, options: dict) -> tuple[float, float]:
    return example("heads_over_processes").apart(device, name, **options)


def layer_with_heads(**options) -> fusedlstm.PeepholeLSTM:
    torch.manual_seed(3)
    return fusedlstm.PeepholeLSTM(I, 12, num_heads=4, **options)


def heads_saved(device: torch.device, folder: str) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shared = example("heads_over_processes").HeadParallel(layer_with_heads(device=device), mesh)
    checkpoint.save(shared.state_dict(), checkpoint_id=folder)


def heads_refused(device: torch.device, options: dict) -> str:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    try:
        example("heads_over_processes").HeadParallel(fusedlstm.LSTM(I, 9, **options, device=device), mesh)
    except ValueError as error:
        return str(error)
    return ""
