"""A layer with heads beside a dense one with the block-diagonal weights: all results and gradients."""

import itertools
import random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedlstm

T, B, I = 5, 4, 3
LENGTHS = torch.tensor([2, 5, 1, 3])
SEQUENCES = {  # what a batch of them is given as
    "dense": (),
    "unbatched": (),
    "packed": (),
    "lengths": ("lengths",),
    "resets": ("resets",),
    "both": ("lengths", "resets"),
    "packed with resets": ("resets",),
}
# Of the module, and of a call of it.
FACTORS = {
    "sizes": ((21, 3), (6, 6), (16, 2)),  # hidden_size, num_heads
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "batch_first": (False, True),
    "dropout": (0.0, 1.0),
    "grad_clip": (None, 0.1),
    "sequence": tuple(SEQUENCES),
    "hx": (True, False),
    "cell_states": (False, True),
}


def pairwise(factors: dict[str, tuple] = FACTORS, **more) -> list[dict]:
    """Few cases, the same every time, such that every two values of two factors meet in one; `more` are factors too."""
    factors, rng = factors | more, random.Random(0)
    values = [[(name, value) for value in of] for name, of in factors.items()]
    missing = {pair for a, b in itertools.combinations(values, 2) for pair in itertools.product(a, b)}
    cases = []
    while missing:
        start = dict(rng.choice(sorted(missing, key=repr)))
        found = [{name: rng.choice(of) for name, of in factors.items()} | start for _ in range(20)]
        cases.append(max(found, key=lambda case: len(missing.intersection(itertools.combinations(case.items(), 2)))))
        missing.difference_update(itertools.combinations(cases[-1].items(), 2))
    return cases


def case_id(case: dict) -> str:
    return "-".join(k if v is True else f"{k} {v}" for k, v in case.items() if v not in (False, None, 0.0))


def with_heads(case: dict) -> fusedlstm.LSTM:
    """The module of a case, in float64."""
    hidden, num_heads = case["sizes"]
    names = ("num_layers", "bidirectional", "bias", "batch_first", "grad_clip")
    dropout = case["dropout"] if case["num_layers"] > 1 else 0.0
    return fusedlstm.LSTM(
        I, hidden, **{k: case[k] for k in names}, dropout=dropout, num_heads=num_heads, dtype=torch.float64
    )


def block_diagonal(weight_hh: Tensor) -> Tensor:
    """[4H, DH] -> [4H, H], gate by gate and head by head."""
    DH = weight_hh.size(1)
    return torch.cat([torch.block_diag(*gate.split(DH)) for gate in weight_hh.chunk(4)])


def blocks(dense: Tensor, num_heads: int) -> Tensor:
    """The way back: [4H, H] -> [4H, DH]."""
    DH = dense.size(1) // num_heads
    of = [gate[k : k + DH, k : k + DH] for gate in dense.chunk(4) for k in range(0, dense.size(1), DH)]
    return torch.cat(of)


def dense_twin(lstm: fusedlstm.LSTM, case: dict | None = None, backend: str = "torch") -> nn.Module:
    """`torch.nn.LSTM`; for a case that needs more, ours without heads (proved in tests/cpu/test_sequences.py)."""
    options = {k: getattr(lstm, k) for k in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")}
    if case is None or not (SEQUENCES[case["sequence"]] or case["grad_clip"] or case["cell_states"]):
        twin = nn.LSTM(lstm.input_size, lstm.hidden_size, **options)
    else:
        twin = fusedlstm.LSTM(lstm.input_size, lstm.hidden_size, **options, backend=backend, grad_clip=lstm.grad_clip)
    weight = next(lstm.parameters())
    twin.to(weight.device, weight.dtype).load_state_dict(
        {name: block_diagonal(w) if "weight_hh" in name else w for name, w in lstm.state_dict().items()}
    )
    return twin


def outcome(module: nn.Module, case: dict) -> dict[str, Tensor]:
    """All results of a case's call and all gradients; of a dense twin those of the blocks of `weight_hh`.

    Values are the same for every module, and of the dtype and on the device of its weights.
    """
    generator = torch.Generator().manual_seed(5)
    like = next(module.parameters())
    hidden, num_heads = case["sizes"]
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batched = case["sequence"] != "unbatched"

    def randn(*shape):
        shape = shape if batched else (shape[0], *shape[2:])  # [., B, .]
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    def turned(x):
        return x.transpose(0, 1) if batched and case["batch_first"] else x

    def packed(x):
        return pack_padded_sequence(turned(x), LENGTHS, case["batch_first"], enforce_sorted=False)

    leaves = {"input": randn(T, B, I).requires_grad_()}
    states = {name: randn(rows, B, hidden).requires_grad_() for name in ("h_0", "c_0")}
    leaves |= states if case["hx"] else {}
    resets = (torch.rand(T, B, generator=generator) < 0.3).to(like.device)
    masks = {"lengths": LENGTHS, "resets": turned(resets)}
    is_packed = case["sequence"].startswith("packed")
    if is_packed:
        masks["resets"] = packed(resets)
    options = {name: masks[name] for name in SEQUENCES[case["sequence"]]}
    options |= {"return_cell_states": True} if case["cell_states"] else {}
    input = packed(leaves["input"]) if is_packed else turned(leaves["input"])
    output, (h_n, c_n), *c_seq = module(input, tuple(states.values()) if case["hx"] else None, **options)
    results = {"output": output, "h_n": h_n, "c_n": c_n} | ({"c_seq": c_seq[0]} if c_seq else {})
    results = {name: x.data if name in ("output", "c_seq") and is_packed else x for name, x in results.items()}
    module.zero_grad()
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in results.values()]
    torch.autograd.backward([*results.values()], grads)
    leaves |= module.named_parameters()
    for name, leaf in leaves.items():
        is_dense = "weight_hh" in name and leaf.size(1) == hidden
        results[f"{name}.grad"] = blocks(leaf.grad, num_heads) if is_dense else leaf.grad
    return {name: x.detach() for name, x in results.items()}
