"""A right call as a value, how such values are drawn, and what must hold of each.

`check` compares every result and every gradient of a call with `equations`, by the accuracy rule.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedlstm
from fuzz import equations
from fuzz.processes import Told, calling, say
from support import error

FORMS = ("dense", "batch_first", "unbatched", "packed", "packed in any order")
STRIDES = ("plain", "transposed", "repeated", "one value", "sliced", "gaps")
HX = ("none", "given", "one for all", "transposed", "one for both")
# "twice" differentiates the gradients again; the last two ask for no gradient.
PASSES = ("once", "twice", "no_grad", "inference_mode")
LOSSES = ("all", "output", "states", "cell states")
MEMBERS = tuple(equations.GATES)
SIZES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a layer, or of a cell if `T` is 0. What is not said has the simplest value. Numbers are from `seed`."""

    member: str = "LSTM"
    backend: str = "auto"
    dtype: str = "float64"
    T: int = 1
    B: int = 1
    I: int = 1
    H: int = 1
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    heads: int = 1
    form: str = "dense"
    lengths: tuple[int, ...] | None = None  # of a packed batch, or the argument of that name
    lengths_as: str = "int64"  # or another dtype, or "list"
    padding_side: str = "right"
    resets: float | None = None  # the share of steps with a reset
    resets_as: str = "bool"
    strides: str = "plain"
    transposed_weights: bool = False
    hx: str = "none"
    cell_states: bool = False
    clip: float | None = None
    clip_of_call: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    save: str = "gates"
    autocast: str | None = None
    frozen: float = 0.0  # the share of tensors that need no gradient
    loss: str = "all"
    passes: str = "once"
    scale: float = 1.0  # of the input
    seed: int = 0

    def __repr__(self) -> str:
        """What differs from the defaults."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        differing = [f"{f.name}={said[f.name]!r}" for f in dataclasses.fields(self) if said[f.name] != f.default]
        return f"Case({', '.join(differing)})"

    @property
    def is_cell(self) -> bool:
        return self.T == 0

    @property
    def packed(self) -> bool:
        return self.form.startswith("packed")

    @property
    def stack(self) -> equations.Stack:
        return equations.Stack(
            self.member,
            self.H,
            self.layers,
            1 + self.bidirectional,
            self.heads,
            self.proj,
            self.bias,
            None if self.clip is None else equations.Clip(self.clip),
            self.zoneout,
        )


# How cases are drawn.


@st.composite
def cases(
    draw, backends: tuple[str, ...], dtypes: tuple[str, ...], sizes=SIZES, most_rows: int = 150, members=MEMBERS
) -> Case:
    """Cases for these engines. Those of the kernels are what they serve."""

    def one(*values):
        return draw(st.sampled_from(values))

    def rarely(value, *others):
        return one(*[value] * (4 * len(others)), *others)

    member, backend, dtype = one(*members), one(*backends), one(*dtypes)
    number = draw(st.integers(0, 2**20))
    I, H = one(*sizes), one(*sizes)
    size = {"B": one(1, 2, 3, 5, 17, 0), "I": I, "H": H}
    heads = 1 if member.startswith("LayerNorm") else rarely(1, *[n for n in (2, 3, H) if n > 1 and H % n == 0] or [1])
    common = {
        "member": member,
        "backend": backend,
        "dtype": dtype,
        "heads": heads,
        "seed": number,
        "bias": rarely(True, False),
    }
    common |= {"hx": one(*HX[: 5 if equations.STATES[member] == 2 else 4]), "strides": rarely(*STRIDES)}
    common |= {"scale": rarely(1.0, 4.0, 0.01), "transposed_weights": rarely(False, True)}
    common |= {"frozen": rarely(0.0, 0.3, 1.0), "loss": rarely(*LOSSES[: 4 if equations.STATES[member] > 1 else 3])}
    precise = dtype in ("float64", "float32")
    common |= {"passes": rarely("once", *PASSES[1 if precise else 2 :])}
    if dtype == "float32":
        common |= {"autocast": rarely(None, "bfloat16", "float16")}
        if common["autocast"] and common["passes"] == "twice":
            common |= {"passes": "once"}
    if member == "SLSTM" and (common.get("autocast") or not precise):
        # The gradient of m belongs to the larger argument of a maximum, which a rounding decides. h needs none of it.
        common |= {"loss": "output"}
    if rarely(False, True):
        cell = dict(common, T=0, **size, form=rarely("dense", "unbatched"))
        if cell["loss"] == "cell states":
            cell |= {"loss": "all"}
        return Case(**cell | ({"B": 1} if cell["form"] == "unbatched" else {}))

    more = {"layers": rarely(1, 2, 3), "bidirectional": rarely(False, True), "save": one("gates", "states")}
    if member == "LSTM" and heads == 1 and H > 1:
        more |= {"proj": rarely(0, *[P for P in (1, 2, H - 1) if P < H])}
    if not (backend == "triton" and more.get("proj")):
        more |= {"clip": rarely(None, 0.1, 1.0), "clip_of_call": one(False, True)}
    if more.get("clip") and common["passes"] == "twice":
        more |= {"layers": 1}  # each layer clips what a second derivative sends to it: docs/lstm.md
    if member != "SLSTM" and not more.get("proj"):
        more |= {"zoneout": rarely((0.0, 0.0), (0.25, 0.5), (0.0, 0.5), (1.0, 0.0))}
    if equations.STATES[member] > 1:
        more |= {"cell_states": one(False, True)}
    if not more.get("cell_states") and common["loss"] == "cell states":
        common |= {"loss": "all"}
    T, form = one(1, 2, 3, 5, 9, 33), one(*FORMS)
    B = 1 if form == "unbatched" else max(size["B"], form.startswith("packed"))
    T = max(1, min(T, most_rows // max(B, 1)))
    if form.startswith("packed"):
        lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
        more |= {"lengths": tuple(lengths if form == FORMS[-1] else sorted(lengths, reverse=True))}
    elif one(False, True):
        more |= {"lengths": tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))}
        more |= {"lengths_as": one("int64", "int32", "uint8", "list"), "padding_side": rarely("right", "left")}
    if rarely(False, True, True):
        more |= {"resets": one(0.3, 0.0, 1.0), "resets_as": rarely("bool", "float32", "uint8")}
    return Case(**dict(common, T=T, **size, form=form, **more) | {"B": B})


# The tensors of a case.


class Tensors(NamedTuple):
    """Leaves, and what a call is made of: each leaf gives its part of a call by a view."""

    input: Tensor
    states: list[Tensor]
    parameters: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {"input": self.input} | {f"hx {k}": s for k, s in enumerate(self.states)} | self.parameters

    def mapped(self, change) -> "Tensors":
        """`change` takes the name of a leaf and the leaf."""
        states = [change(f"hx {k}", s) for k, s in enumerate(self.states)]
        return Tensors(change("input", self.input), states, {k: change(k, p) for k, p in self.parameters.items()})


def _input_shape(case: Case) -> tuple[int, ...]:
    if case.is_cell:
        return (case.I,) if case.form == "unbatched" else (case.B, case.I)
    if case.packed:
        return sum(case.lengths), case.I
    leading = {"dense": (case.T, case.B), "batch_first": (case.B, case.T), "unbatched": (case.T,)}
    return (*leading[case.form], case.I)


def _base_shape(shape: tuple[int, ...], strides: str) -> tuple[int, ...]:
    """Of the leaf that `_view` makes a tensor of this shape from."""
    first, *rest, last = shape if len(shape) > 1 else (1, *shape)
    if strides == "transposed" and len(shape) > 1:
        return (*shape[1::-1], *shape[2:])
    if strides == "repeated" and len(shape) > 1:
        return (min(1, first), *rest, last)
    if strides == "one value":
        return (*shape[:-1], 1)
    if strides == "sliced":
        return (*shape[:-1], 2 * last + 1)
    return (*shape[:-1], 2 * last) if strides == "gaps" else shape


def _view(leaf: Tensor, shape: tuple[int, ...], strides: str) -> Tensor:
    if strides == "transposed" and len(shape) > 1:
        return leaf.transpose(0, 1)
    if strides in ("repeated", "one value"):
        return leaf.expand(shape)
    if strides == "sliced":
        return leaf[..., 1 : shape[-1] + 1]
    return leaf[..., ::2] if strides == "gaps" else leaf


def _state_shapes(case: Case) -> list[tuple[int, ...]]:
    rows = () if case.is_cell else (case.layers * case.stack.directions,)
    wide = (*rows, case.B, case.H)
    return [(*wide[:-1], case.proj or case.H)] + [wide] * (equations.STATES[case.member] - 1)


def parameter_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    D = case.stack.directions
    suffixes = [f"_l{k // D}" + ("_reverse" if k % D else "") for k in range(case.layers * D)]
    by_layer = zip([""] if case.is_cell else suffixes, case.stack.shapes(case.I), strict=True)
    return {name + suffix: shape for suffix, shapes in by_layer for name, shape in shapes.items()}


def tensors(case: Case) -> Tensors:
    """The leaves, with values that `case.dtype` has, in float64."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(shape, scale=1.0):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(getattr(torch, case.dtype)).double()

    x = randn(_base_shape(_input_shape(case), case.strides), case.scale)
    shapes = [] if case.hx == "none" else _state_shapes(case)
    if case.hx == "one for all":
        shapes = [(*rows, min(1, B), width) for *rows, B, width in shapes]
    elif case.hx == "transposed":
        shapes = [(*rows, width, B) for *rows, B, width in shapes]
    elif case.hx == "one for both" and not case.proj:
        shapes = shapes[:1]
    states = [randn(shape) for shape in shapes]
    if case.member == "SLSTM" and states:  # n is positive, or 0 if the state is empty
        states[2] = states[2].abs() + 0.5
        states[2].flatten()[::3] = 0.0
    parameters = {}
    for name, shape in parameter_shapes(case).items():
        scale = 1 / math.sqrt(shape[1]) if len(shape) > 1 else 0.5
        parameters[name] = randn(shape, scale) + (1.0 if name.startswith("gain") else 0.0)
    return Tensors(x, states, parameters).mapped(lambda name, leaf: leaf.to(getattr(torch, case.dtype)).double())


def _states(case: Case, leaves: list[Tensor]) -> list[Tensor]:
    """The initial states, each [L * D, B, P or H] or [B, H]."""
    if case.hx == "one for all":
        return [leaf.expand(shape) for leaf, shape in zip(leaves, _state_shapes(case), strict=True)]
    if case.hx == "transposed":
        return [leaf.transpose(-1, -2) for leaf in leaves]
    return [leaves[0]] * 2 if case.hx == "one for both" and len(leaves) == 1 else leaves


def _resets(case: Case) -> Tensor:
    """[T, B] bool"""
    if case.resets is None:
        return torch.zeros(case.T, case.B, dtype=torch.bool)
    generator = torch.Generator().manual_seed(case.seed + 1)
    return torch.rand(case.T, case.B, generator=generator) < case.resets


# A call, ours and that of the equations. Both return named results.


def module_of(case: Case, leaves: Tensors) -> nn.Module:
    name, _, nonlinearity = case.member.partition(" ")
    x = leaves.input
    options = {
        "bias": case.bias,
        "dtype": x.dtype,
        "device": x.device,
        "backend": case.backend,
        "num_heads": case.heads,
    }
    options |= {"nonlinearity": nonlinearity} if nonlinearity else {}
    if not case.is_cell:
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional, "save": case.save}
        options |= {"batch_first": case.form == "batch_first", "zoneout": case.zoneout}
        options |= {"proj_size": case.proj} if case.proj else {}
        options |= {} if case.clip_of_call else {"grad_clip": case.clip}
    module = getattr(fusedlstm, name + ("Cell" if case.is_cell else ""))(case.I, case.H, **options).eval()
    assert {k: tuple(p.shape) for k, p in module.named_parameters()} == parameter_shapes(case)
    for name, leaf in leaves.parameters.items():
        parameter = module.get_parameter(name)
        if case.transposed_weights and leaf.dim() == 2:
            parameter.data = torch.empty_like(leaf.T, memory_format=torch.contiguous_format).T
        with torch.no_grad():
            parameter.copy_(leaf)
        parameter.requires_grad_(leaf.requires_grad)
    return module


def ours(case: Case, leaves: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of a call, and the leaves with our parameters among them."""
    module = module_of(case, leaves)
    leaves = leaves._replace(parameters=dict(module.named_parameters()))
    shape, unbatched = _input_shape(case), case.form == "unbatched"
    x, hx = _view(leaves.input, shape, case.strides), _states(case, leaves.states)
    if unbatched:
        hx = [s.squeeze(-2) for s in hx]
    hx = None if not hx else hx[0] if len(hx) == 1 else tuple(hx)
    autocast = contextlib.nullcontext()
    if case.autocast:
        autocast = torch.autocast(x.device.type, getattr(torch, case.autocast))
    before = [leaf.detach().clone() for leaf in leaves.named().values()]
    with autocast:
        if case.is_cell:
            states = module(x, hx)
            sequences = {}
        else:
            output, states, *beside = module(*_wrapped(case, x), hx, **_options(case))
            sequences = {"output": output} | _numbered("cell state", beside[0] if beside else [])
    for leaf, value in zip(leaves.named().values(), before, strict=True):
        assert torch.equal(leaf.detach(), value), "an argument was changed"
    sequences = {k: x.data if isinstance(x, PackedSequence) else x for k, x in sequences.items()}
    return sequences | _numbered("state", states), leaves


def _numbered(name: str, found) -> dict[str, Tensor]:
    found = [found] if isinstance(found, Tensor | PackedSequence) else found
    if isinstance(found, PackedSequence):
        found = [found]
    return {f"{name} {k}": x for k, x in enumerate(found)}


def _wrapped(case: Case, x: Tensor) -> tuple:
    if not case.packed:
        return (x,)
    like = _pack(case, torch.zeros(case.T, case.B, 1, device=x.device))
    return (PackedSequence(x, *like[1:]),)


def _pack(case: Case, x: Tensor) -> PackedSequence:
    """Of [T, B, ...]."""
    return pack_padded_sequence(
        x[: max(case.lengths)], torch.tensor(case.lengths), enforce_sorted=case.form == "packed"
    )


def _options(case: Case) -> dict:
    options = {"return_cell_states": True} if case.cell_states else {}
    if case.clip_of_call:
        options["grad_clip"] = case.clip
    if case.lengths is not None and not case.packed:
        as_list = case.lengths_as == "list"
        options["lengths"] = (
            [*case.lengths] if as_list else torch.tensor(case.lengths, dtype=getattr(torch, case.lengths_as))
        )
    if case.padding_side != "right":
        options["padding_side"] = case.padding_side
    if case.resets is not None:
        resets = _resets(case).to(getattr(torch, case.resets_as))
        by_form = {"unbatched": lambda r: r[:, 0], "batch_first": lambda r: r.T, "dense": lambda r: r}
        options["resets"] = _pack(case, resets) if case.packed else by_form[case.form](resets)
    return options  # lengths and resets are on the host


def theirs(case: Case, leaves: Tensors, stack: equations.Stack) -> dict[str, Tensor]:
    """The results of the equations, in the form of `ours`, in the dtype of the leaves."""
    shape = _input_shape(case)
    x, states = _view(leaves.input, shape, case.strides), _states(case, leaves.states)
    T, dtype = max(case.T, 1), x.dtype
    exists, resets = torch.ones(T, case.B, dtype=torch.bool), torch.zeros(T, case.B, dtype=torch.bool)
    if case.is_cell:
        x = x.reshape(1, case.B, case.I)
        states = [s.unsqueeze(0) for s in states]
    else:
        x = _padded(case, x)
        resets = _resets(case)
        if case.lengths is not None:
            exists = torch.arange(T).unsqueeze(1) < torch.tensor(case.lengths, dtype=torch.int64)
            exists = exists if case.padding_side == "right" else exists.flip(0)
    if not states:
        shapes = [((1,) if case.is_cell else ()) + shape for shape in _state_shapes(case)]
        states = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    parameters, names = [], list(leaves.parameters)
    for shapes in stack.shapes(case.I):
        parameters.append({name: leaves.parameters[names.pop(0)] for name in shapes})
    output, finals, beside = equations.run(stack, x, states, parameters, exists, resets)
    if case.is_cell:
        found, sequences = _numbered("state", [s.squeeze(0) for s in finals]), {}
    else:
        found, sequences = _numbered("state", finals), {"output": output}
        sequences |= _numbered("cell state", beside if case.cell_states else [])
    if case.packed:
        sequences = {k: _pack(case, s).data for k, s in sequences.items()}
    elif case.form == "batch_first":
        sequences = {k: s.transpose(0, 1) for k, s in sequences.items()}
    elif case.form == "unbatched":
        sequences = {k: s.squeeze(1) for k, s in sequences.items()}
        found = {k: s.squeeze(-2) for k, s in found.items()}
    return sequences | found


def _padded(case: Case, x: Tensor) -> Tensor:
    """[T, B, I]"""
    if case.packed:
        (packed,) = _wrapped(case, x)
        return pad_packed_sequence(packed, total_length=case.T)[0]
    return x.transpose(0, 1) if case.form == "batch_first" else x.unsqueeze(1) if case.form == "unbatched" else x


# The check.


def _upstream(case: Case, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of a result, the same in every dtype."""
    generator = torch.Generator().manual_seed(case.seed + 2 + sum(map(ord, name)))
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype).to(x)


def _in_loss(case: Case, name: str) -> bool:
    output = "state 0" if case.is_cell else "output"
    return name.startswith({"output": output, "states": "state", "cell states": "cell state"}.get(case.loss, ""))


def gradients(case: Case, leaves: Tensors, results: dict[str, Tensor], dtype: torch.dtype, clip=None) -> dict:
    """Of all leaves that need one; and of the gradients, if they are differentiated again. None is zero."""
    wanted = {k: leaf for k, leaf in leaves.named().items() if leaf.requires_grad}
    loss = {k: x for k, x in results.items() if _in_loss(case, k) and x.requires_grad}
    if not wanted or not loss:
        return {}
    ups = [_upstream(case, k, x, dtype) for k, x in loss.items()]
    twice = case.passes == "twice"
    found = torch.autograd.grad([*loss.values()], [*wanted.values()], ups, create_graph=twice, allow_unused=True)
    named = {
        f"grad {k}": torch.zeros_like(x) if g is None else g for (k, x), g in zip(wanted.items(), found, strict=True)
    }
    again = {k: g for k, g in named.items() if twice and g.requires_grad}
    if again:
        if clip is not None:
            clip.on = False
        total = sum((g * _upstream(case, k, g, dtype)).sum() for k, g in again.items())
        second = torch.autograd.grad(total, [*wanted.values()], allow_unused=True)
        pairs = zip(wanted.items(), second, strict=True)
        named |= {f"second grad {k}": torch.zeros_like(x) if g is None else g for (k, x), g in pairs}
    return named


def _dtype(case: Case) -> torch.dtype:
    """Of the results."""
    return getattr(torch, case.autocast or case.dtype)


def _needing(case: Case, values: Tensors) -> set[str]:
    """The names of the leaves that need a gradient."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    names = [*values.named()] if case.passes in ("once", "twice") else []
    return {name for name in names if torch.rand((), generator=generator) >= case.frozen}


def expected(case: Case, values: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results and gradients of the equations, computed in `dtype`."""
    needing, stack = _needing(case, values), case.stack
    leaves = values.mapped(lambda name, v: v.to(dtype, copy=True).requires_grad_(name in needing))
    results = theirs(case, leaves, stack)
    return results | gradients(case, leaves, results, _dtype(case), stack.clip)


def found(case: Case, values: Tensors, device: str) -> dict[str, Tensor]:
    """Our results and gradients, on the CPU."""
    needing, dtype = _needing(case, values), getattr(torch, case.dtype)
    leaves = values.mapped(lambda name, v: v.to(device, dtype, copy=True).requires_grad_(name in needing))
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(case.passes, contextlib.nullcontext)():
        results, leaves = ours(case, leaves)
    for name, x in results.items():
        assert x.dtype == _dtype(case), f"{name}: expected {_dtype(case)}, got {x.dtype}"
    named = gradients(case, leaves, results, _dtype(case))
    return {k: x.detach().cpu() for k, x in (results | named).items()}


RUNS = 16


def check(case: Case, device: str = "cpu") -> None:
    """Ours beside the equations in the same dtype and in float64. Raises an AssertionError.

    The rule is that of `assert_accurate`. Numbers that are few may be exact by chance in the same dtype. So where one
    run of the equations says that ours are wrong, more runs are asked, with arguments that are moved by up to two ulps.
    """
    values = tensors(case)
    results, exact = found(case, values, device), expected(case, values, torch.float64)
    missing = exact.keys() - results.keys()
    assert not missing, f"no {', '.join(sorted(missing))}"
    wrong = {}
    for name, x in results.items():
        wanted = exact[name] if name in exact else torch.zeros_like(x, dtype=torch.float64)
        assert x.shape == wanted.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(wanted.shape)}"
        err = error(x, wanted.detach())
        if not err <= _floor(case, wanted):
            wrong[name] = err
    for k in range(RUNS if wrong else 0):
        same = expected(case, values if k == 0 else _moved(case, values, k), _dtype(case))
        for name, err in [*wrong.items()]:
            # What cannot be computed in this dtype is nobody's fault.
            theirs_ = error(same[name].detach(), exact[name].detach()) if name in same else 0.0
            if err <= 2 * theirs_ + _floor(case, exact.get(name)) or not math.isfinite(theirs_):
                del wrong[name]
        if not wrong:
            return
    assert not wrong, ", ".join(f"{name}: error {err:.2e}" for name, err in wrong.items())


def _floor(case: Case, exact: Tensor | None) -> float:
    """Two ulps, of the numbers or of the smallest ones; in float64 what other tests of ours allow."""
    info = torch.finfo(_dtype(case))
    size = 0.0 if exact is None else exact.norm().item()
    least = (
        1e-10
        if info.dtype == "float64"
        else 2 * info.smallest_normal * info.eps * (1 if exact is None else exact.numel() ** 0.5)
    )
    relative = 1e-9 if info.dtype == "float64" else 2 * info.eps
    return max(relative, least / size) if size else least


def _moved(case: Case, values: Tensors, k: int) -> Tensors:
    generator, eps = torch.Generator().manual_seed(k), torch.finfo(_dtype(case)).eps
    return values.mapped(lambda name, v: v + 2 * v * eps * (2 * torch.rand(v.shape, generator=generator) - 1))


# Many of them.


def of_engines(kind: str, members: tuple[str, ...] = MEMBERS):
    """Cases for the engines that a process has: Triton decides at import whether it interprets."""
    if kind == "cpu":
        dtypes = ("float64", "float64", "float32", "bfloat16", "float16")
        return cases(("auto", "torch", "reference"), dtypes, members=members)
    sizes = (1, 2, 3, 5, 8, 15, 16, 17, 33)
    members = tuple(member for member in members if member not in equations.WITHOUT_KERNELS)
    return cases(("triton",), ("float32", "bfloat16", "float16"), sizes, most_rows=20, members=members)


SETTINGS = settings(
    database=None,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=[*HealthCheck],
)


def run(kind: str, seed: int, seconds: float) -> Told:
    """Check random cases in other processes. If one dies, the next begins with other cases."""
    told, end = Told(), time.monotonic() + seconds
    while time.monotonic() < end:
        told.follow("fuzz.cases", (kind, seed, end), interpret=kind == "kernels")
        seed += 1000_000
    return told


def _child(kind: str, first: str, end: str) -> None:
    """In rounds, for a round ends with the first case that is wrong, made small."""
    torch.backends.cudnn.allow_tf32 = False  # as tests/kernels
    for number in itertools.count(int(first)):
        if time.monotonic() > float(end):
            return
        last = None

        @seed(number)
        @settings(SETTINGS, derandomize=False, max_examples=200)
        @given(of_engines(kind))
        def one_round(case):
            nonlocal last
            last = case
            with calling(repr(case), case.backend, case.member):
                check(case)

        try:
            one_round()
        except Exception as error:
            say("fault", repr(last), f"{type(error).__name__}: {str(error)[:300]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _child(*sys.argv[1:])
