"""Train one model in several processes, each on its share of every batch: data parallel, or sharded.

The task is to add. Each of T steps shows a number between 0 and 1, and two of the steps are marked. The model reads a
sequence of 5 to T steps and must name the sum of its two marked numbers. Who always says 1 has a mean squared error
of 1/6. The LSTM must carry the first number to the end.

Every step has the same batch whatever the number of processes is, so the errors that are printed are the same up to
rounding. With GPUs each process has one, and they talk by NCCL. Without, they talk by gloo.

    python examples/data_parallel.py                                # starts a process per GPU, or two on the CPU
    python examples/data_parallel.py --processes 1                  # the same numbers
    python examples/data_parallel.py --sharded                      # parameters are sharded (FSDP2)
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/data_parallel.py
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusedlstm

SHORTEST = 5


class Adder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lstm = fusedlstm.LSTM(2, hidden_size, init=fusedlstm.inits.forget_bias_)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """From [T, B, 2] to [B]."""
        _, (h_n, _) = self.lstm(x, lengths=lengths)
        return self.head(h_n[-1]).squeeze(-1)


def draw(generator: torch.Generator, steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers and marks [T, B, 2], lengths [B] and sums [B]."""
    lengths = torch.randint(SHORTEST, steps + 1, (batch,), generator=generator)
    numbers = torch.rand(steps, batch, generator=generator)
    order = torch.rand(steps, batch, generator=generator).masked_fill(torch.arange(steps)[:, None] >= lengths, 2.0)
    marks = torch.zeros(steps, batch).scatter_(0, order.argsort(0)[:2], 1.0)
    return torch.stack([numbers, marks], -1), lengths, (numbers * marks).sum(0)


def train(args: argparse.Namespace) -> None:
    """Train in this process, which is one of a group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if args.batch % world:
        raise SystemExit(f"--batch: expected a multiple of {world} processes, got {args.batch}")
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    torch.manual_seed(args.seed)
    model: nn.Module = Adder(args.hidden_size).to(device)
    if args.sharded:
        for module in (model.lstm, model):
            fully_shard(module)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    share = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    every, errors, rates = max(1, args.steps // 10), [], []
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        x, lengths, sums = draw(generator, args.length, args.batch)
        found = model(x[:, share].to(device), lengths[share].to(device))
        loss = nn.functional.mse_loss(found, sums[share].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append(loss.detach())
        if step % every and step < args.steps:
            continue
        mean = torch.stack(errors).mean()
        dist.all_reduce(mean)
        rates.append(len(errors) * args.batch / (time.perf_counter() - start))
        if rank == 0:
            print(f"step {step:4d} of {args.steps}: error {mean.item() / world:.4f}, {rates[-1]:,.0f} sequences/s")
        errors, start = [], time.perf_counter()
    if rank == 0:
        kind = "sharded over" if args.sharded else "in"
        print(
            f"final error {mean.item() / world:.4f}, {kind} {world} process(es) on {device.type}; "
            f"median {statistics.median(rates):,.0f} sequences/s. "
            "With the defaults, expect an error below 0.003; always guessing 1 has 0.167."
        )


def begin(rank: int, world: int, init_method: str, args: argparse.Namespace) -> None:
    """Join the group, train, and leave it."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    nccl = torch.cuda.device_count() > local
    if nccl:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if nccl else "gloo", init_method=init_method, rank=rank, world_size=world)
    train(args)
    dist.barrier()  # a process that ends while another still reads from it may abort
    dist.destroy_process_group()


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    processes = torch.cuda.device_count() or 2
    helps = {
        "steps": (500, "updates"),
        "batch": (64, "sequences of a step, of all processes together"),
        "length": (12, f"the longest sequence, at least {SHORTEST}"),
        "hidden-size": (64, "hidden units"),
        "seed": (0, "of the initial values and of the sequences"),
        "processes": (processes, "how many to start on this machine; torchrun starts its own"),
    }
    for name, (default, text) in helps.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: {default}")
    parser.add_argument("--sharded", action="store_true", help="shard parameters, gradients and optimiser (FSDP2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    if dist.is_torchelastic_launched():
        begin(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", args)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(begin, (args.processes, f"file://{folder}/group", args), nprocs=args.processes)


if __name__ == "__main__":
    main()
