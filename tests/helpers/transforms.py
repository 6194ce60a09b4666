"""Calls of `functional.run` under torch's transforms, each with the expected result from plain loops of autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fusedlstm import cells, functional
from fusedlstm.noise import Rates

T, B, I, H = 3, 2, 2, 4
MANY = 2  # samples, or gradients at once

# What is called: a cell and what is special about it. `sequences` keeps ATen out: these are our ops.
OURS = {"sequences": "cells"}
CASES = {
    **{cell: {"cell": cell, **OURS} for cell in cells.CELLS if cell != "rnn_relu"},
    "one step": {"cell": "lstm", "steps": 1},  # in a kernel of its own
    "two directions": {"cell": "gru", "bidirectional": True, **OURS},
    "two layers": {"cell": "peephole", "num_layers": 2},  # a wave of kernels
    "states": {"cell": "lstm", "save": "states", **OURS},
    "norms and states": {"cell": "layernorm", "save": "states"},
    "projected": {"cell": "lstm", "proj_size": 3, **OURS},
    "heads": {"cell": "lstm", "heads": 2, **OURS},
    "clipped": {"cell": "coupled", "grad_clip": 0.05, **OURS},
    "clipped, but not reached": {"cell": "lstm", "grad_clip": 1e6, **OURS},
    "packed": {"cell": "lstm", "batch_sizes": torch.tensor([2, 2, 1]), **OURS},
    "lengths": {"cell": "lstm", "lengths": torch.tensor([1, 3]), **OURS},
    "resets": {"cell": "lstm", "resets": torch.tensor([[False, True], [True, False], [False, False]]), **OURS},
    "zoneout, in the mean": {"cell": "lstm", "rates": Rates(zoneout_h=0.3)},
}


class Call:
    """f(x, w): everything that a case's call returns, as one vector, of its input and the first recurrent weight."""

    def __init__(self, case: dict, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
        options = dict(case)
        of, P = cells.CELLS[options.pop("cell")], options.get("proj_size") or H
        heads, steps = options.pop("heads", 1), options.pop("steps", T)
        self.rows = functional.Rows(**{k: options.pop(k) for k in functional.Rows._fields if k in options})
        self.spec = functional.Spec(of, backend=backend, **options)
        layers, directions = self.spec.num_layers, self.spec.directions
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return (0.5 * torch.randn(*shape, generator=generator)).to(dtype).to(device)

        self.weights = []
        for k in range(layers * directions):
            G, size = of.num_gates, I if k < directions else directions * P
            self.weights += [randn(G * H, size), randn(G * H, P // heads), randn(G * H), randn(G * H)]
            self.weights += [randn(P, H)] if P != H else []
            self.weights += [randn(blocks * H) for blocks in of.vector_blocks.values()]
        states = [randn(layers * directions, B, P), *(randn(layers * directions, B, H).abs() for _ in of.states[1:])]
        self.states = tuple(states)
        rows = (steps, B) if self.rows.batch_sizes is None else (int(self.rows.batch_sizes.sum()),)
        self.x, self.t_x, self.xs = randn(*rows, I), randn(*rows, I), randn(MANY, *rows, I)
        self.w, self.t_w, self.ws = self.weights[1], *(randn(*n, *self.weights[1].shape) for n in ((), (MANY,)))
        with torch.no_grad():
            size = len(self(self.x, self.w))
        self.g, self.gs = randn(size), randn(MANY, size)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        weights = [self.weights[0], w, *self.weights[2:]]
        output, states, sequences = functional.run(self.spec, x, self.states, weights, self.rows)
        return torch.cat([y.flatten() for y in (output, *states, *sequences)])

    def loss(self, x: Tensor, w: Tensor) -> Tensor:
        return (self(x, w) * self.g).sin().sum()

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.x.clone().requires_grad_(), self.w.clone().requires_grad_()


def gradients(f: Call, x: Tensor, w: Tensor, g: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of the loss, or with g of <f, g>; detached."""
    x, w = (y.detach().clone().requires_grad_() for y in (x, w))
    return torch.autograd.grad(f.loss(x, w) if g is None else (f(x, w) * g).sum(), (x, w))


def stacked(results) -> list[Tensor]:
    return [torch.stack(r) for r in zip(*results, strict=True)]


def second(f: Call, first) -> tuple[Tensor, ...]:
    """The gradients of a sum over first gradients."""
    x, w = f.leaves()
    return torch.autograd.grad(sum(g.sin().sum() for g in first(x, w)), (x, w))


def along(results: tuple[Tensor, ...], of: tuple[Tensor, ...], directions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The derivatives of results in a direction: J v is the gradient by u of <J^T u, v>, so of reverse mode alone."""
    u = tuple(torch.zeros_like(y, requires_grad=True) for y in results)
    back = torch.autograd.grad(results, of, u, create_graph=True)
    return torch.autograd.grad(sum((b * v).sum() for b, v in zip(back, directions, strict=True)), u)


def directional(f: Call, v_x: Tensor, v_w: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f, and its derivative in a direction."""
    x, w = f.leaves()
    x = x if at is None else at.clone().requires_grad_()
    y = f(x, w)
    return y.detach(), along((y,), (x, w), (v_x, v_w))[0]


def hessian_product(f: Call) -> list[Tensor]:
    """Of the loss, in the direction of the tangents."""
    x, w = f.leaves()
    first = torch.autograd.grad(f.loss(x, w), (x, w), create_graph=True)
    return list(along(first, (x, w), (f.t_x, f.t_w)))


def tangents(f: Call, requires_grad: bool) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        leaves = (y.clone().requires_grad_(requires_grad) for y in (f.x, f.w))
        x, w = (forward_ad.make_dual(y, t) for y, t in zip(leaves, (f.t_x, f.t_w), strict=True))
        return tuple(y.detach() for y in forward_ad.unpack_dual(f(x, w)))


def forward_over_reverse(f: Call) -> list[Tensor]:
    with forward_ad.dual_level():
        x, w = (forward_ad.make_dual(y, t) for y, t in zip(f.leaves(), (f.t_x, f.t_w), strict=True))
        found = torch.autograd.grad(f.loss(x, w), (x, w))
        return [forward_ad.unpack_dual(g).tangent for g in found]


def tangents_of_gradients(f: Call) -> list[Tensor]:
    """A backward whose incoming gradients have tangents."""
    x, w = f.leaves()
    y = f(x, w)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, (x, w), forward_ad.make_dual(f.gs[0], f.gs[1]))
        return [forward_ad.unpack_dual(g).tangent for g in found]


def gradient_product(f: Call) -> list[Tensor]:
    """The derivative of a backward by its incoming gradients, in a direction."""
    (x, w), g = f.leaves(), f.gs[0].clone().requires_grad_()
    return list(along(torch.autograd.grad(f(x, w), (x, w), g, create_graph=True), (g,), (f.gs[1],)))


def at_once(f: Call, create_graph: bool = False):
    def first(x, w):
        return torch.autograd.grad(f(x, w), (x, w), f.gs, is_grads_batched=True, create_graph=create_graph)

    return first


def one_by_one(f: Call):
    def first(x, w):
        found = (torch.autograd.grad(f(x, w), (x, w), g, create_graph=True) for g in f.gs)
        return [torch.stack(r) for r in zip(*found, strict=True)]

    return first


def by_samples(f: Call, in_dims: tuple) -> list[Tensor]:
    """vmap of f with gradients from outside."""
    x, w = (
        y.clone().requires_grad_() for y in (f.x if in_dims[0] is None else f.xs, f.w if in_dims[1] is None else f.ws)
    )
    y = torch.vmap(f, in_dims=in_dims)(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), f.gs)]


def samples_in_turn(f: Call, in_dims: tuple) -> list[Tensor]:
    pairs = [(f.x if in_dims[0] is None else f.xs[k], f.w if in_dims[1] is None else f.ws[k]) for k in range(MANY)]
    y = torch.stack([f(x, w) for x, w in pairs])
    found = stacked(gradients(f, x, w, g) for (x, w), g in zip(pairs, f.gs, strict=True))
    return [y, *(g if dim is not None else g.sum(0) for g, dim in zip(found, in_dims, strict=True))]


def jacobians(f: Call, transform: Callable) -> list[Tensor]:
    return list(transform(f, argnums=(0, 1))(f.x, f.w))


def rows(f: Call) -> list[Tensor]:
    return stacked(gradients(f, f.x, f.w, g) for g in torch.eye(len(f.g), dtype=f.g.dtype))


def checkpointed(f: Call) -> tuple[Tensor, ...]:
    x, w = f.leaves()
    return torch.autograd.grad(checkpoint(f.loss, x, w, use_reentrant=False), (x, w))


def compiled(f: Call) -> list[Tensor]:
    torch.compiler.reset()
    x, w = f.leaves()
    y = torch.compile(f.__call__, backend="aot_eager", fullgraph=True)(x, w)
    return [y.detach(), *torch.autograd.grad(y, (x, w), f.g)]


FORWARD_MODE = ("jacfwd", "jvp", "dual, nothing requires grad", "dual", "jvp of vmap")
# A path: what runs under the transform, and what it must give.
PATHS: dict[str, tuple[Callable, Callable]] = {
    "backward": (lambda f: gradients(f, f.x, f.w), lambda f: gradients(f, f.x, f.w)),
    "double backward": (
        lambda f: second(f, lambda x, w: torch.autograd.grad(f.loss(x, w), (x, w), create_graph=True)),
        lambda f: second(f, lambda x, w: torch.autograd.grad(f.loss(x, w), (x, w), create_graph=True)),
    ),
    "many at once": (lambda f: at_once(f)(*f.leaves()), lambda f: stacked(gradients(f, f.x, f.w, g) for g in f.gs)),
    "many at once, twice": (lambda f: second(f, at_once(f, True)), lambda f: second(f, one_by_one(f))),
    "func.grad": (lambda f: torch.func.grad(f.loss, (0, 1))(f.x, f.w), lambda f: gradients(f, f.x, f.w)),
    "func.grad, twice": (
        lambda f: torch.func.grad(
            lambda x, w: sum(g.sin().sum() for g in torch.func.grad(f.loss, (0, 1))(x, w)), (0, 1)
        )(f.x, f.w),
        lambda f: second(f, lambda x, w: torch.autograd.grad(f.loss(x, w), (x, w), create_graph=True)),
    ),
    "vmap": (
        lambda f: [torch.no_grad()(torch.vmap(f, in_dims=(0, None)))(f.xs, f.w)],
        lambda f: [torch.stack([f(x, f.w) for x in f.xs])],
    ),
    "vmap over inputs": (lambda f: by_samples(f, (0, None)), lambda f: samples_in_turn(f, (0, None))),
    "vmap over weights": (lambda f: by_samples(f, (None, 0)), lambda f: samples_in_turn(f, (None, 0))),
    "vmap of grad": (
        lambda f: torch.vmap(torch.func.grad(f.loss, (0, 1)), in_dims=(0, None))(f.xs, f.w),
        lambda f: stacked(gradients(f, x, f.w) for x in f.xs),
    ),
    "jacrev": (lambda f: jacobians(f, torch.func.jacrev), rows),
    "jacrev without grad mode": (lambda f: jacobians(f, torch.no_grad()(torch.func.jacrev)), rows),
    "jacfwd": (lambda f: jacobians(f, torch.func.jacfwd), rows),
    "jvp": (lambda f: torch.func.jvp(f, (f.x, f.w), (f.t_x, f.t_w)), lambda f: directional(f, f.t_x, f.t_w)),
    "jvp of vmap": (
        lambda f: torch.func.jvp(torch.vmap(f, in_dims=(0, None)), (f.xs, f.w), (f.xs.sin(), f.t_w)),
        lambda f: stacked(directional(f, x.sin(), f.t_w, x) for x in f.xs),
    ),
    "dual, nothing requires grad": (lambda f: tangents(f, False), lambda f: directional(f, f.t_x, f.t_w)),
    "dual": (lambda f: tangents(f, True), lambda f: directional(f, f.t_x, f.t_w)),
    "forward over reverse": (forward_over_reverse, hessian_product),
    "func: forward over reverse": (
        lambda f: torch.func.jvp(torch.func.grad(f.loss, (0, 1)), (f.x, f.w), (f.t_x, f.t_w))[1],
        hessian_product,
    ),
    "tangents of gradients": (tangents_of_gradients, gradient_product),
    "checkpoint": (checkpointed, lambda f: gradients(f, f.x, f.w)),
    "compile": (compiled, lambda f: [f(f.x, f.w), *gradients(f, f.x, f.w, f.g)]),
}


def pairs(cases: dict[str, dict]) -> list:
    """All paths of all cases, for pytest."""
    return [pytest.param(path, case, id=f"{path}-{name}") for path in PATHS for name, case in cases.items()]


def plain(path: str, case: dict, dtype: torch.dtype) -> list[Tensor]:
    """What a path must give, by the specification."""
    if path in FORWARD_MODE and "grad_clip" in case:  # what is clipped are gradients, and a tangent is none
        case = {name: value for name, value in case.items() if name != "grad_clip"}
    return [y.detach() for y in PATHS[path][1](Call(case, "reference", dtype))]


def found(path: str, case: dict, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    return [y.detach() for y in PATHS[path][0](Call(case, backend, dtype, device))]


REFUSED = "expected tensors without tangents"


def check_tangents_behind_samples(f: Call) -> None:
    """Torch would drop these tangents silently, so there is an error. A level without any tangents does no harm."""
    with torch.no_grad(), pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(torch.vmap(f, in_dims=(0, None)), (f.xs, f.w), (f.xs, f.t_w))
    with forward_ad.dual_level():
        inside = gradients(f, f.x, f.w)
    torch.testing.assert_close(inside, gradients(f, f.x, f.w))


def check_tangents_in_graphs(f: Call) -> None:
    """That a graph compiled before raises, and one compiled of the derivative serves."""
    torch.compiler.reset()
    in_graph = torch.compile(f.__call__, backend="aot_eager", fullgraph=True)
    in_graph(f.x, f.w)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REFUSED):
        in_graph(forward_ad.make_dual(f.x, f.t_x), f.w)

    def derivative(x: Tensor, t: Tensor):
        return torch.func.jvp(lambda x: f(x, f.w), (x,), (t,))

    compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(f.x, f.t_x), derivative(f.x, f.t_x))
