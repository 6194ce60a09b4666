"""What users do with a recurrent layer, each as a function that raises if it does not work or gives another number.

`COLUMNS` are layers, ours and torch's, and `FEATURES` what is done with them. `tests/compatibility.py` makes a table of
all pairs. A function gets a column's `Layer`, and compares with a plain call of the same layer.
"""

import copy
import io
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedlstm

T, B, I, H = 6, 3, 4, 5
ANY = {"input": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
SIZES = ((T, B), (9, 2), (4, 7), (33, 5))


class Layer(NamedTuple):
    """A column: a class of layers, and the options that it is built with."""

    of: type[nn.Module]
    options: dict[str, str]

    @property
    def precise(self) -> torch.dtype:
        """The most precise dtype that the column has."""
        return torch.float32 if self.options.get("backend") == "triton" else torch.float64

    def __call__(self, **more) -> nn.Module:
        torch.manual_seed(0)
        return self.of(I, H, **self.options, **more)


OURS = ("LSTM", "GRU", "RNN", "PeepholeLSTM", "CoupledLSTM", "LayerNormLSTM", "SLSTM", "ResetBeforeGRU", "LayerNormGRU")
COLUMNS = {name: Layer(getattr(fusedlstm, name), {}) for name in OURS}
KERNELS = {f"{name}, triton": Layer(getattr(fusedlstm, name), {"backend": "triton"}) for name in OURS[:2]}
STOCK = {f"nn.{name}": Layer(getattr(nn, name), {}) for name in OURS[:3]}

FEATURES: dict[str, Callable[[Layer], None]] = {}


def feature(name: str):
    def of(function: Callable[[Layer], None]):
        FEATURES[name] = function
        return function

    return of


def data(steps: int = T, batch: int = B) -> Tensor:
    return torch.randn(steps, batch, I, generator=torch.Generator().manual_seed(steps))


def close(found, expected, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


def gradients(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(call(x).square().sum(), [*module.parameters()])]


def compiled(layer: Layer, training: bool, backend: str = "aot_eager", **options) -> None:
    """In one graph each time, with at most two graphs for all sizes."""
    torch.compiler.reset()
    module, graphs = layer(), []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    again = torch.compile(module, fullgraph=True, backend=counting, **options)
    for size in SIZES:
        x = data(*size)
        if training:
            close(*(gradients(module, lambda x, of=of: of(x)[0], x) for of in (again, module)))
        else:
            with torch.no_grad():
                close(again(x), module(x))
    assert len(graphs) <= 2, f"{len(graphs)} graphs for {len(SIZES)} sizes"


@feature("`torch.compile(fullgraph=True)`, inference, changing T and B, two graphs")
def _(layer):
    compiled(layer, training=False)


@feature("`torch.compile(fullgraph=True)`, training, changing T and B, two graphs")
def _(layer):
    compiled(layer, training=True)


@feature("the same with `dynamic=True`")
def _(layer):
    compiled(layer, training=True, dynamic=True)


@feature("`torch.compile`, training, one size, graph breaks allowed")
def _(layer):
    torch.compiler.reset()
    module = layer()
    again = torch.compile(module, backend="aot_eager")
    close(*(gradients(module, lambda x, of=of: of(x)[0], data()) for of in (again, module)))


@feature("bfloat16 autocast on a CPU, training")
def _(layer):
    module = layer()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, lambda x: module(x)[0].float(), data())
    close(found, gradients(module, lambda x: module(x)[0], data()), 0.2)


@feature("bfloat16 autocast, compiled, training")
def _(layer):
    torch.compiler.reset()
    module = layer()
    again = torch.compile(module, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(module, lambda x: again(x)[0].float(), data())
    close(found, gradients(module, lambda x: module(x)[0], data()), 0.2)


def exported(layer: Layer, strict: bool, shapes, sizes) -> None:
    module = layer().eval()
    with torch.no_grad():
        program = export(module, (data(),), dynamic_shapes=shapes, strict=strict)
        for size in sizes:
            close(program.module()(data(*size)), module(data(*size)))


@feature("`torch.export`, fixed sizes")
def _(layer):
    exported(layer, False, None, SIZES[:1])


@feature("`torch.export`, any T and B")
def _(layer):
    exported(layer, False, ANY, SIZES)


@feature("`torch.export(strict=True)`, any T and B")
def _(layer):
    exported(layer, True, ANY, SIZES)


def trained(layer: Layer, shapes, size) -> None:
    """The gradients of exported programs, also those of what is below the layer."""
    module = layer()
    for strict in (False, True):
        program = export(module, (data(),), dynamic_shapes=shapes, strict=strict).module()
        found = []
        for of in (program, module):
            x = data(*size).requires_grad_()
            found.append(torch.autograd.grad(of(x)[0].square().sum(), [x, *of.parameters()]))
        close(*found)


@feature("the gradients of an exported program, fixed sizes")
def _(layer):
    trained(layer, None, SIZES[0])


@feature("the gradients of an exported program, any T and B")
def _(layer):
    trained(layer, ({0: torch.export.Dim("T", min=3), 1: torch.export.Dim("B", min=2)},), SIZES[1])


@feature("an exported program, saved and run by a new process (ours: after `import fusedlstm`)")
def _(layer):
    module = layer().eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.export.save(export(module, (data(),)), Path(folder) / "program.pt2")
        torch.save((data(), module(data())[0]), Path(folder) / "expected.pt")
        first = "import fusedlstm, torch" if layer.of.__module__.startswith("fusedlstm") else "import torch"
        code = (
            f"{first}; program = torch.export.load('program.pt2').module(); x, y = torch.load('expected.pt'); "
            "torch.testing.assert_close(program(x)[0], y)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert not done.returncode, done.stderr.splitlines()[-1]


@feature("`torch.onnx.export(dynamo=True)`, any T and B, in ONNX Runtime")
def _(layer):
    import onnxruntime

    module = layer().eval()
    program = torch.onnx.export(module, (data(),), dynamic_shapes=ANY, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in SIZES:
        with torch.no_grad():
            expected = module(data(*size))[0]
        close(torch.from_numpy(session.run(None, {"input": data(*size).numpy()})[0]), expected)


@feature("AOTInductor, any T and B")
def _(layer):
    module = layer().eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = export(module, (data(),), dynamic_shapes=ANY)
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/layer.pt2")
        run = torch._inductor.aoti_load_package(path)
        for size in SIZES:
            close(run(data(*size)), module(data(*size)))


@feature("`torch.jit.trace`")
def _(layer):
    module = layer().eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, (data(),))
        for size in SIZES:
            close(traced(data(*size)), module(data(*size)))


@feature("`torch.fx.symbolic_trace` of a model around it")
def _(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

        def forward(self, x):
            return self.layer(x)[0].relu()

    model = Model()
    close(torch.fx.symbolic_trace(model)(data()), model(data()))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(module: nn.Module) -> Callable[[dict, Tensor], Tensor]:
    return lambda own, x: functional_call(module, own, (x,))[0].sin().sum()


def one_by_one(function: Callable, xs: Tensor):
    found = [function(x) for x in xs]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return {name: torch.stack([own[name] for own in found]) for name in found[0]}


@feature("`torch.func.grad`, `vjp`, `jacrev`")
def _(layer):
    module = layer()
    own, loss, x = parameters(module), loss_of(module), data()
    found = torch.func.grad(loss)(own, x)
    close([*found.values()], [*torch.autograd.grad(module(x)[0].sin().sum(), [*module.parameters()])])
    results, back = torch.func.vjp(lambda x: module(x)[0], x)
    leaf = x.clone().requires_grad_()
    close(back(torch.ones_like(results))[0], torch.autograd.grad(module(leaf)[0].sum(), leaf)[0])
    rows = torch.func.jacrev(lambda x: module(x)[0][-1, 0])(x)
    leaf = x.clone().requires_grad_()
    close(rows[0], torch.autograd.grad(module(leaf)[0][-1, 0, 0], leaf)[0])


def jvp(layer: Layer, transform: Callable) -> None:
    """A transform, beside differences in float64."""
    module, exact = layer().to(layer.precise), layer._replace(options={})().double()
    x, t, step = data().double(), data().double().cos(), 1e-5
    with torch.no_grad():
        expected = (exact(x + step * t)[0] - exact(x - step * t)[0]) / (2 * step)
    found = transform(lambda x: module(x)[0], x.to(layer.precise), t.to(layer.precise))
    close(found, expected.to(layer.precise), 1e-4 if layer.precise == torch.float32 else 1e-6)


@feature("`torch.func.jvp`")
def _(layer):
    jvp(layer, lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1])


@feature("`torch.func.jacfwd`")
def _(layer):
    jvp(layer, lambda f, x, t: torch.einsum("tbhTBi,TBi->tbh", torch.func.jacfwd(f)(x), t))


@feature("forward-mode AD, dual tensors")
def _(layer):
    def derivative(f, x, t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent

    jvp(layer, derivative)


@feature("`torch.func.hessian`")
def _(layer):
    module, x = layer(), data(2, 1)
    found = torch.func.hessian(lambda x: module(x)[0].sin().sum())(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(leaf)[0].sin().sum(), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in first.flatten()]
    close(found.flatten(), torch.stack(rows).flatten())


@feature("`gradcheck` and `gradgradcheck`")
def _(layer):
    module, x = layer().to(layer.precise), data(3, 2).to(layer.precise).requires_grad_()
    limits = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-2} if layer.precise == torch.float32 else {}
    assert torch.autograd.gradcheck(lambda x: module(x)[0], (x,), **limits)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,), **limits)


@feature("`torch.vmap` over inputs")
def _(layer):
    module, xs = layer(), torch.stack([data(), data(T + 1)[:T]])
    close(torch.vmap(lambda x: module(x)[0])(xs), one_by_one(lambda x: module(x)[0], xs))


@feature("`torch.vmap` over the parameters of an ensemble")
def _(layer):
    modules = [layer() for _ in range(3)]
    for k, module in enumerate(modules):
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1 + k)
    own, _ = stack_module_state(modules)
    x = data()
    found = torch.vmap(lambda own: functional_call(modules[0], own, (x,))[0])(own)
    close(found, torch.stack([module(x)[0] for module in modules]))


@feature("`torch.vmap` of `torch.func.grad`: a gradient for every sample")
def _(layer):
    module, xs = layer(), torch.stack([data(), data(T + 1)[:T]])
    own, loss = parameters(module), loss_of(module)
    close(
        torch.vmap(torch.func.grad(loss), (None, 0))(own, xs), one_by_one(lambda x: torch.func.grad(loss)(own, x), xs)
    )


@feature("`torch.compile` of a function with `torch.func.grad`, graph breaks allowed")
def _(layer):
    torch.compiler.reset()
    module, x = layer(), data()
    own, loss = parameters(module), loss_of(module)
    compiled = torch.compile(lambda own, x: torch.func.grad(loss)(own, x), backend="aot_eager")
    close([*compiled(own, x).values()], [*torch.func.grad(loss)(own, x).values()])


@feature("`torch.compile(fullgraph=True)` of functions with transforms of `torch.func`")
def _(layer):
    module, x, xs = layer(), data(2, 2), torch.stack([data(2, 2), data(3, 2)[1:]])
    own, loss = parameters(module), loss_of(module)

    def run(x):
        return module(x)[0]

    def in_x(x):
        return loss(own, x)

    for function in (
        lambda: [*torch.func.grad(loss)(own, x).values()],
        lambda: torch.func.grad(in_x)(x),
        lambda: torch.func.jacrev(run)(x),
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.hessian(in_x)(x),
        lambda: torch.vmap(run)(xs),
        lambda: [*torch.vmap(torch.func.grad(loss), (None, 0))(own, xs).values()],
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        close(compiled(), function())
    with torch.no_grad():
        close(torch.compile(lambda: torch.vmap(run)(xs), backend="aot_eager", fullgraph=True)(), torch.vmap(run)(xs))


@feature("`is_grads_batched=True`")
def _(layer):
    module, x = layer(), data().requires_grad_()
    y = module(x)[0]
    many = torch.stack([torch.ones_like(y), y.detach()])
    (found,) = torch.autograd.grad(y, x, many, retain_graph=True, is_grads_batched=True)
    close(found, torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in many]))


@feature("`torch.utils.checkpoint`")
def _(layer):
    module = layer()
    again = gradients(module, lambda x: checkpoint(lambda x: module(x)[0], x, use_reentrant=False), data())
    close(again, gradients(module, lambda x: module(x)[0], data()))


@feature("jagged nested tensors in and out")
def _(layer):
    module = layer(batch_first=True)
    rows = [data(n, 1)[:, 0] for n in (4, 2, 6)]
    output = module(torch.nested.nested_tensor(rows, layout=torch.jagged))[0]
    close([*output.unbind()], [module(row.unsqueeze(0))[0][0] for row in rows])


@feature("float64, one step, batch of one")
def _(layer):
    module = layer().double()
    close(module(data(1, 1).double())[0].float(), module.float()(data(1, 1))[0])


@feature("`pickle`, `deepcopy`, `torch.save` of a module")
def _(layer):
    module = layer()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        close(other(data())[0], module(data())[0])


@feature("an average of weights (`swa_utils.AveragedModel`)")
def _(layer):
    module = layer()
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    close(average(data())[0], module(data())[0])


@feature("optimisers `foreach` and `fused`")
def _(layer):
    for option in ("foreach", "fused"):
        module = layer()
        optimizer = torch.optim.Adam(module.parameters(), **{option: True})
        before = [p.clone() for p in module.parameters()]
        module(data())[0].sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@feature("`FakeTensorMode`, meta device")
def _(layer):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert layer()(torch.empty(T, B, I))[0].shape == (T, B, H)
    assert layer().to("meta")(torch.empty(T, B, I, device="meta"))[0].shape == (T, B, H)


@feature("`FlopCounterMode` counts at least the products of the steps")
def _(layer):
    module = layer()
    with FlopCounterMode(display=False) as counter:
        module(data())
    assert counter.get_total_flops() >= 2 * T * B * (module.weight_ih_l0.numel() + module.weight_hh_l0.numel())


def outcome(name: str, layer: Layer) -> str:
    """ "yes", or the first line of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            FEATURES[name](layer)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {text[0]}"
    return "yes"
