"""The heads of one layer are shared among processes: each computes its own, and all get the whole output.

With `num_heads=n` the recurrent weight is block diagonal, so a head sees only its own h, and the processes exchange
nothing while the time loop runs. They exchange the output once in the forward, and the gradient of the input once in
the backward. `HeadParallel` is the whole code: copy it. This program compares it with the same layer in one process.

    python examples/heads_over_processes.py
"""

import argparse
import tempfile

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedlstm


class HeadParallel(nn.Module):
    """A layer whose heads are shared among the processes of a mesh. It is called as the layer is.

    Args:
        layer: A layer with `num_layers=1` and without noise inside of a step, the same in every process. It may not be
            a `LayerNormLSTM`, whose norm takes all units.
        mesh: A mesh of one dimension. Its size divides `num_heads`.

    Parameters: They have the names of those of `layer`, and their first axis [G*H] is split into [G, H]. They are
        `DTensor`s that are sharded over H, so norms of gradients, optimisers and distributed checkpoints see them
        whole. `flatten(0, 1)` gives the parameters of `layer`.
    Shapes: Input, states and results are those of `layer`, whole and the same in every process. `return_cell_states`
        and `return_states` are not supported.
    """

    def __init__(self, layer: fusedlstm.Recurrent, mesh: DeviceMesh) -> None:
        super().__init__()
        heads, hidden, count = layer.num_heads, layer.hidden_size, mesh.size()
        if heads % count:
            raise ValueError(f"num_heads: expected a multiple of {count} processes, got {heads}")
        if layer.num_layers > 1 or any(layer.rates):
            raise ValueError(f"layer: expected one layer without noise inside of a step, got {layer}")
        self.mesh, self.directions = mesh, 1 + layer.bidirectional
        options = {name: getattr(layer, name) for name in ("bias", "batch_first", "bidirectional", "grad_clip", "save")}
        own = type(layer)(layer.input_size, hidden // count, num_heads=heads // count, device="meta", **options)
        self._own = (own,)  # in a tuple, so that its parameters are not ours
        for name, p in layer.named_parameters():
            by_gate = distribute_tensor(p.detach().unflatten(0, (-1, hidden)), mesh, [Shard(1)])
            self.register_parameter(name, nn.Parameter(by_gate))

    def forward(self, input: Tensor, hx=None, **options):
        weights = {name: p.to_local().flatten(0, 1) for name, p in self.named_parameters()}
        # Each process has a part of the gradient of the input, and the backward adds them.
        input = DTensor.from_local(input, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        states = hx if hx is None else _each(self._share, hx)
        output, states = torch.func.functional_call(self._own[0], weights, (input, states), options)
        by_direction = output.unflatten(-1, (self.directions, -1))
        return self._whole(by_direction).flatten(-2), _each(self._whole, states)

    def _share(self, state: Tensor) -> Tensor:
        return DTensor.from_local(state, self.mesh, [Replicate()]).redistribute(placements=[Shard(-1)]).to_local()

    def _whole(self, x: Tensor) -> Tensor:
        return DTensor.from_local(x, self.mesh, [Shard(-1)]).full_tensor()


def _each(function, states):
    return function(states) if isinstance(states, Tensor) else tuple(map(function, states))


def apart(device: torch.device, name: str, **options) -> tuple[float, float]:
    """How far results and gradients are from those of one process, and how far they may be by the rounding of float32.

    Relative to float64. The loss takes every result, and each process computes all of it.
    """
    torch.manual_seed(0)
    layer = getattr(fusedlstm, name)(5, 24, num_heads=4, device=device, **options)
    exact = getattr(fusedlstm, name)(5, 24, num_heads=4, device=device, dtype=torch.float64, **options)
    exact.load_state_dict(layer.state_dict())
    shared = HeadParallel(layer, init_device_mesh(device.type, (dist.get_world_size(),)))
    directions = 1 + layer.bidirectional
    x, h = torch.randn(6, 3, 5, device=device), torch.randn(directions, 3, 24, device=device)
    weight = torch.randn(6, 3, 24 * directions, device=device)

    def numbers(module: nn.Module, dtype: torch.dtype) -> Tensor:
        tensors = [t.detach().to(dtype).requires_grad_() for t in (x, h)]
        beside_h = [torch.zeros_like(tensors[1]) for _ in fusedlstm.cells.CELLS[layer.cell].states[1:]]
        output, finals = module(tensors[0], (tensors[1], *beside_h) if beside_h else tensors[1])
        finals = finals if isinstance(finals, tuple) else (finals,)
        ((output * weight).sum() + sum(s.square().sum() for s in finals)).backward()
        found = [output, *finals, *(t.grad for t in (*tensors, *module.parameters()))]
        whole = (t.full_tensor() if isinstance(t, DTensor) else t for t in found)
        return torch.cat([t.detach().flatten() for t in whole])

    right = numbers(exact, torch.float64)
    ours, one = ((numbers(m, torch.float32) - right).norm() / right.norm() for m in (shared, layer))
    return ours.item(), (2 * one + 2 * torch.finfo(torch.float32).eps).item()


def compare(device: torch.device) -> None:
    for name in ("LSTM", "GRU", "PeepholeLSTM"):
        error, limit = apart(device, name)
        if dist.get_rank() == 0:
            verdict = "equal to rounding" if error <= limit else "NOT EQUAL"
            count = dist.get_world_size()
            print(f"{name}: {count} processes beside one: {verdict} (error {error:.1e}, limit {limit:.1e})")


def work(rank: int, processes: int, file: str) -> None:
    gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpus else "gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    compare(device)
    dist.barrier()  # a process that ends while another still reads from it may abort
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="1, 2 or 4, for there are four heads; default: 2")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args.processes, f"{folder}/group"), nprocs=args.processes)


if __name__ == "__main__":
    main()
