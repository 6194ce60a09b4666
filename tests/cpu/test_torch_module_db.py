"""PyTorch's own tests of LSTM, GRU, RNN and their cells, with our modules in their place.

Each test restates the one of its name in PyTorch's test/test_modules.py. That stock passes shows that the test is
right. Inputs with a projection are subjects of their own.
"""

import contextlib
import copy
import inspect
import io
import itertools
import os
import pickle
import sys
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.meta_utils import assert_metadata_eq
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fusedlstm
from grids import WHOLE
from support import assert_accurate

# A warning of stock's about itself.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def global_state():
    """What the import of PyTorch's test package changes, or might."""
    return {
        "backends frozen": torch.backends.flags_frozen(),
        "TorchScript": [vars(c)["__call__"] for c in (torch._C.ScriptFunction, torch._C.ScriptMethod)],
        "warnings": [*warnings.filters],
        "environment": hash(frozenset(os.environ.items())),  # hashed, for a failure prints it
        "path": [*sys.path],
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "TF32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "random numbers": torch.get_rng_state().tolist(),
    }


@contextlib.contextmanager
def leaving_no_trace():
    """Undo what PyTorch's test package does to its process, which runs other tests too."""
    with (
        warnings.catch_warnings(),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.object(torch.backends, "disable_global_flags"),
        mock.patch.object(torch._C.ScriptFunction, "__call__", torch._C.ScriptFunction.__call__),
        mock.patch.object(torch._C.ScriptMethod, "__call__", torch._C.ScriptMethod.__call__),
    ):
        yield


STATE_BEFORE = global_state()
with leaving_no_trace():
    from torch.testing._internal.common_cuda import tf32_off
    from torch.testing._internal.common_modules import (
        FunctionInput,
        ModuleErrorEnum,
        ModuleInfo,
        ModuleInput,
        module_db,
    )
    from torch.testing._internal.common_utils import gradcheck, gradgradcheck
STATE_AFTER = global_state()

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CLASSES = (*LAYERS, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
INFOS = {info.module_cls: info for info in module_db if info.module_cls in CLASSES}


class Subject(NamedTuple):
    """A class under test, and the part of the database that it is tested with."""

    info: ModuleInfo
    projected: bool
    backend: str | None  # None: the class of torch.nn

    @property
    def module_cls(self) -> type[nn.Module]:
        stock = self.info.module_cls
        return stock if self.backend is None else getattr(fusedlstm, stock.__name__)

    def arguments(self, constructor: FunctionInput, **factory) -> tuple[tuple, dict]:
        """Of the constructor; `factory`: device and dtype."""
        backend = {} if self.backend is None else {"backend": self.backend}
        return constructor.args, {**constructor.kwargs, **factory, **backend}

    def build(self, constructor: FunctionInput, **factory) -> nn.Module:
        args, kwargs = self.arguments(constructor, **factory)
        return self.module_cls(*args, **kwargs)

    def prepared(self, module_input: ModuleInput, dtype: torch.dtype, training: bool, device="cpu") -> nn.Module:
        return self.build(module_input.constructor_input).to(device).to(dtype).train(training)

    def stock(self, module: nn.Module, module_input: ModuleInput) -> nn.Module:
        """torch.nn's module with the parameters of `module`."""
        parameter = next(module.parameters())
        stock = self._replace(backend=None).prepared(module_input, parameter.dtype, module.training, parameter.device)
        copy_parameters(module, stock)
        return stock

    def inputs(
        self, dtype: torch.dtype, training: bool, requires_grad=False, device="cpu", whole=False
    ) -> list[ModuleInput]:
        """Every third input, of GRU and RNN every fifth: each option has each value. All if `whole` is true."""
        found = [
            m
            for m in self.info.module_inputs_func(
                self.info, device=device, dtype=dtype, requires_grad=requires_grad, training=training
            )
            if (m.constructor_input.kwargs.get("proj_size", 0) > 0) == self.projected
        ]
        assert found and all(m.forward_input is not None for m in found)
        if whole or WHOLE or len(found) < 16:
            return found
        return found[::5] if self.info.module_cls in (nn.GRU, nn.RNN) else found[::3]


def subjects(*backends, projections=True):
    return [
        pytest.param(
            Subject(INFOS[module_cls], projected, backend),
            id=f"{module_cls.__name__}{'-proj' if projected else ''}-{backend or 'stock'}",
        )
        for module_cls, projected in ((nn.LSTM, True), *((cls, False) for cls in CLASSES))
        for backend in (None, *backends)
        if projections or not projected
    ]


every_subject = pytest.mark.parametrize("subject", subjects("torch", "reference"))
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_a_gpu = pytest.mark.parametrize("subject", subjects("auto", "torch"))


@pytest.fixture(params=[False, True], ids=["set data", "swap"])
def swap(request):
    """Whether `Module.to` exchanges the parameters or sets their data."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """As `load_state_dict`, which cannot swap the parameters of torch.nn's RNNs: they hold weak references to them."""
    with torch.no_grad():
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            b.copy_(a)


def run(module: nn.Module, module_input: ModuleInput):
    return module(*module_input.forward_input.args, **module_input.forward_input.kwargs)


def tensors(module_input: ModuleInput) -> list[Tensor]:
    return tree_leaves((module_input.forward_input.args, module_input.forward_input.kwargs))


def with_tensors(module_input: ModuleInput, change) -> ModuleInput:
    """The same call with `change` of every tensor."""
    args, kwargs = tree_map(change, (module_input.forward_input.args, module_input.forward_input.kwargs))
    return ModuleInput(module_input.constructor_input, FunctionInput(*args, **kwargs))


def gradients(module: nn.Module, module_input: ModuleInput, grad_outputs: list[Tensor]):
    """Outputs, and the gradients of inputs and parameters; every output goes backward by itself."""
    wanted = [*tensors(module_input), *module.parameters()]
    for x in wanted:
        x.grad = None
    outputs = run(module, module_input)
    for y, grad in zip(tree_leaves(outputs), grad_outputs, strict=True):
        y.backward(grad, retain_graph=True)
    return outputs, [x.grad for x in wanted]


def assert_parameters_are(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    assert list(module.parameters())
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, nn.Parameter), name
        assert (parameter.device, parameter.dtype) == (torch.device(device), dtype), name


def test_the_import_leaves_no_trace():
    assert STATE_AFTER == STATE_BEFORE


def test_the_subjects_share_the_whole_database():
    count = dict.fromkeys(INFOS, 0)
    for parameter in subjects():
        subject = parameter.values[0]
        count[subject.info.module_cls] += len(subject.inputs(torch.float32, True, whole=True))
    for module_cls, info in INFOS.items():
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
        assert count[module_cls] == len(inputs)
        assert set(info.dtypes) == {torch.float32, torch.float64}
    assert count[nn.LSTM] >= 32 and count[nn.GRU] >= 16 and count[nn.RNN] >= 32
    assert count[nn.LSTMCell] >= 2 and count[nn.GRUCell] >= 2 and count[nn.RNNCell] >= 3


@both_dtypes
@both_modes
@every_subject
def test_forward(subject, training, dtype):
    for module_input in subject.inputs(dtype, training, whole=True):
        module = subject.prepared(module_input, dtype, training)
        outputs = run(module, module_input)
        if module_input.reference_fn is not None:
            args, kwargs = module_input.forward_input.args, module_input.forward_input.kwargs
            torch.testing.assert_close(outputs, module_input.reference_fn(module, *args, **kwargs))
        torch.testing.assert_close(outputs, run(subject.stock(module, module_input), module_input))
        {torch.float32: module.float, torch.float64: module.double}[dtype]()
        assert_parameters_are(module, "cpu", dtype)
        torch.testing.assert_close(run(module, module_input), outputs, rtol=0, atol=0)


@both_dtypes
@both_modes
@every_subject
def test_factory_kwargs(subject, training, dtype):
    for module_input in subject.inputs(dtype, training):
        constructor = module_input.constructor_input
        for device in ("cpu", "meta"):
            assert_parameters_are(subject.build(constructor, device=device, dtype=dtype).train(training), device, dtype)
        if subject.module_cls in LAYERS:
            continue  # skip_init refuses a class whose signature is (*args, **kwargs)
        args, kwargs = subject.arguments(constructor, dtype=dtype)
        state = torch.get_rng_state()
        module = nn.utils.skip_init(subject.module_cls, *args, **kwargs).train(training)
        assert torch.equal(torch.get_rng_state(), state)
        assert_parameters_are(module, "cpu", dtype)
        filled = subject.prepared(module_input, dtype, training)
        module.load_state_dict(filled.state_dict())
        torch.testing.assert_close(run(module, module_input), run(filled, module_input), rtol=0, atol=0)


@both_dtypes
@both_modes
@every_subject
def test_repr(subject, training, dtype):
    for module_input in subject.inputs(dtype, training):
        module = subject.prepared(module_input, dtype, training)
        backend = getattr(module, "backend", "auto")  # torch's own have none
        shown = "" if backend == "auto" else f", backend={backend}"
        assert repr(module) == str(module) == repr(subject.stock(module, module_input))[:-1] + shown + ")"


@both_dtypes
@both_modes
@every_subject
def test_save_load(subject, training, dtype):
    def through_a_file(saved, **options):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, **options)

    for module_input in subject.inputs(dtype, training):
        module = subject.prepared(module_input, dtype, training)
        outputs, state = run(module, module_input), module.state_dict()
        for loaded in (through_a_file(module, weights_only=False), pickle.loads(pickle.dumps(module))):
            assert type(loaded) is subject.module_cls
            assert loaded.training == training and getattr(loaded, "backend", None) == subject.backend
            torch.testing.assert_close(run(loaded, module_input), outputs, rtol=0, atol=0)
        for weights_only in (False, True):
            loaded_state = through_a_file(state, weights_only=weights_only)
            assert list(loaded_state) == list(subject.stock(module, module_input).state_dict())
            torch.testing.assert_close(loaded_state, state, rtol=0, atol=0)
            other = subject.prepared(module_input, dtype, training)
            other.load_state_dict(loaded_state)
            torch.testing.assert_close(run(other, module_input), outputs, rtol=0, atol=0)


@both_modes
@every_subject
def test_deepcopy(subject, training):
    for module_input in subject.inputs(torch.float32, training):
        module = subject.prepared(module_input, torch.float32, training)
        outputs = run(module, module_input)
        copied = copy.deepcopy(module)
        assert type(copied) is subject.module_cls
        assert copied.training == training and getattr(copied, "backend", None) == subject.backend
        torch.testing.assert_close(run(copied, module_input), outputs, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        torch.testing.assert_close(run(copied, module_input), outputs, rtol=0, atol=0)


@both_dtypes
@both_modes
@every_subject
def test_check_inplace(subject, training, dtype):
    """There is no `inplace`, and nothing is written to an argument."""
    assert "inplace" not in inspect.signature(subject.module_cls).parameters
    for module_input in subject.inputs(dtype, training, requires_grad=True):
        module = subject.prepared(module_input, dtype, training)
        given = [*tensors(module_input), *module.parameters()]
        before = [(x._version, x.detach().clone()) for x in given]
        sum(y.sum() for y in tree_leaves(run(module, module_input))).backward()
        for x, (version, value) in zip(given, before, strict=True):
            assert x._version == version and torch.equal(x, value)


@both_dtypes
@both_modes
@every_subject
def test_non_contiguous_tensors(subject, training, dtype):
    def non_contiguous(x):
        spread = x.repeat_interleave(2, -1)[..., ::2].detach().requires_grad_(x.requires_grad)
        assert not spread.is_contiguous()
        return spread

    for module_input in subject.inputs(dtype, training, requires_grad=True):
        module = subject.prepared(module_input, dtype, training)
        grads = [torch.randn_like(y) for y in tree_leaves(run(module, module_input))]
        expected = gradients(module, module_input, grads)
        inputs = (module_input, with_tensors(module_input, non_contiguous))
        for given, grad_outputs in itertools.product(inputs, (grads, [non_contiguous(g) for g in grads])):
            torch.testing.assert_close(gradients(module, given, grad_outputs), expected)


def check_gradients(subject: Subject, training: bool, check, every: int = 1) -> None:
    """Of all inputs and parameters together, and of one parameter alone, another one with every module input."""
    for k, module_input in enumerate(subject.inputs(torch.float64, training, requires_grad=True)[::every]):
        module = subject.prepared(module_input, torch.float64, training)
        parameters = [*module.parameters()]
        args, kwargs = module_input.forward_input.args, module_input.forward_input.kwargs
        flat, structure = tree_flatten((args, kwargs, parameters))

        def function(*flat, module=module, structure=structure):
            args, kwargs, _ = tree_unflatten(flat, structure)  # gradcheck changes the parameters where they lie
            return tree_leaves(module(*args, **kwargs))

        assert check(function, flat)
        for parameter in parameters:
            parameter.requires_grad_(False)
        parameters[k % len(parameters)].requires_grad_(True)
        assert check(function, flat)


@both_modes
@every_subject
def test_grad(subject, training):
    check_gradients(subject, training, gradcheck)


@both_modes
@every_subject
def test_gradgrad(subject, training):
    # No input has dropout: both modes run the same operations, and this is the slowest test.
    few = subject.info.module_cls in (nn.GRU, nn.RNN)
    check_gradients(subject, training, gradgradcheck, every=(3 if few else 1) if training else (5 if few else 3))


@both_dtypes
@both_modes
@every_subject
def test_memory_format(subject, training, dtype):
    """No memory format of the module changes a result, and results and gradients are contiguous."""
    for module_input in subject.inputs(dtype, training, requires_grad=True):
        module = subject.prepared(module_input, dtype, training)
        differentiated = [*tensors(module_input), *module.parameters()]
        outputs = run(module, module_input)
        grad_outputs = [torch.randn_like(y) for y in tree_leaves(outputs)]
        expected = (outputs, torch.autograd.grad(tree_leaves(outputs), differentiated, grad_outputs))
        for memory_format in (torch.preserve_format, torch.contiguous_format):
            module.to(memory_format=memory_format)
            outputs = run(module, module_input)
            found = (outputs, torch.autograd.grad(tree_leaves(outputs), differentiated, grad_outputs))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert all(x.is_contiguous() for x in tree_leaves(found))


@both_dtypes
@both_modes
@every_subject
def test_if_train_and_eval_modes_differ(subject, training, dtype):
    """The mode is read only where the database says so; without dropout it changes nothing."""
    for module_input in subject.inputs(dtype, training):
        module = subject.prepared(module_input, dtype, training)
        outputs = run(module, module_input)
        torch.testing.assert_close(run(module.train(not training), module_input), outputs, rtol=0, atol=0)
        del module.training
        expectation = contextlib.nullcontext()
        if subject.info.train_and_eval_differ:
            expectation = pytest.raises(AttributeError, match="'training'")
        with expectation:
            run(module, module_input)


@both_modes
@every_subject
def test_device_ctx_init(subject, training):
    def assert_equal(a, b):
        assert a == b

    for module_input in subject.inputs(torch.float32, training):
        module = subject.prepared(module_input, torch.float32, training)
        with torch.device("meta"):
            on_meta = subject.build(module_input.constructor_input).train(training)
        for a, b in zip(on_meta.parameters(), module.parameters(), strict=True):
            assert a.is_meta
            assert_metadata_eq(assert_equal, a, b)
        outputs = run(on_meta, with_tensors(module_input, lambda x: x.to("meta")))
        for a, b in zip(tree_leaves(outputs), tree_leaves(run(module, module_input)), strict=True):
            assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


@both_dtypes
@both_modes
@pytest.mark.parametrize("subject", subjects("torch", "reference", projections=False))
def test_errors(subject, training, dtype):
    def error_of(subject, error_input):
        module_input = error_input.module_error_input
        raises = pytest.raises(error_input.error_type, match=error_input.error_regex)
        if error_input.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with raises as raised:
                subject.build(module_input.constructor_input)
        else:
            assert error_input.error_on is ModuleErrorEnum.FORWARD_ERROR
            module = subject.build(module_input.constructor_input).train(training)
            with raises as raised:
                run(module, module_input)
        return raised.value

    error_inputs = subject.info.module_error_inputs_func(
        subject.info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert error_inputs
    for error_input in error_inputs:
        raised, stock = error_of(subject, error_input), error_of(subject._replace(backend=None), error_input)
        assert type(raised) is type(stock) is error_input.error_type
        assert str(raised) == str(stock)


def identities(xs) -> tuple[list, list]:
    """Of the Python objects and of the tensors behind them."""
    xs = [*xs]
    return [id(x) for x in xs], [x._cdata for x in xs]


@pytest.mark.parametrize("set_grad", [False, True], ids=["no grad", "grad"])
@both_modes
@every_subject
def test_to(subject, training, swap, set_grad):
    for module_input in subject.inputs(torch.float32, training):
        module = subject.build(module_input.constructor_input).train(training)
        for name, parameter in [*module.named_parameters()]:
            replaced = nn.Parameter(parameter.detach().clone())
            setattr(module, name, replaced)
            if set_grad:
                replaced.grad = torch.randn_like(replaced)
        if swap and not set_grad:  # a module that has been backward can be swapped
            tree_leaves(run(module, module_input))[0].sum().backward()
            module.to(dtype=torch.half).to(dtype=torch.float32)
            module.zero_grad()
        previous = torch.float32
        for dtype in (torch.float32, torch.float64, torch.float32):
            objects, data = identities(module.parameters())
            grads = identities(p.grad for p in module.parameters()) if set_grad else None
            module.to(device="cpu", dtype=dtype)
            assert_parameters_are(module, "cpu", dtype)
            new_objects, new_data = identities(module.parameters())
            assert new_objects == objects
            assert all((a != b) == swap for a, b in zip(data, new_data, strict=True))
            if set_grad:
                assert all(p.grad.dtype == dtype for p in module.parameters())
                new_grads = identities(p.grad for p in module.parameters())
                if not swap:
                    assert new_grads == grads
                else:  # a gradient that is there already is not swapped
                    assert all((a != b) == (dtype != previous) for a, b in zip(grads[1], new_grads[1], strict=True))
            previous = dtype
            in_dtype = with_tensors(module_input, lambda x, dtype=dtype: x.to(dtype))
            torch.testing.assert_close(run(module, in_dtype), run(subject.stock(module, module_input), in_dtype))


@both_modes
@every_subject
def test_to_empty(subject, training, swap):
    for module_input in subject.inputs(torch.float32, training):
        with torch.device("meta"):
            module = subject.build(module_input.constructor_input).train(training)
        objects, data = identities(module.parameters())
        module.to_empty(device="cpu")
        assert_parameters_are(module, "cpu", torch.float32)
        new_objects, new_data = identities(module.parameters())
        assert all((a == b) == swap for a, b in zip(objects, new_objects, strict=True))
        assert all(a != b for a, b in zip(data, new_data, strict=True))
        filled = subject.prepared(module_input, torch.float32, training)
        copy_parameters(filled, module)
        torch.testing.assert_close(run(module, module_input), run(filled, module_input), rtol=0, atol=0)


@needs_a_gpu
@both_dtypes
@both_modes
@on_a_gpu
def test_multiple_device_transfer(subject, training, dtype):
    devices = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    for module_input in subject.inputs(dtype, training):
        module = subject.prepared(module_input, dtype, training, devices[0])
        expected = run(subject.prepared(module_input, dtype, training, "cpu"), module_input)
        for device in (devices[0], "cpu", *devices):
            module.to(device)
            outputs = run(module, with_tensors(module_input, lambda x, device=device: x.to(device)))
            assert_parameters_are(module, device, dtype)
            for a, b in zip(tree_leaves(outputs), tree_leaves(expected), strict=True):
                assert (a.device, a.shape, a.dtype) == (torch.device(device), b.shape, b.dtype)


@needs_a_gpu
@both_dtypes
@both_modes
@on_a_gpu
def test_cpu_gpu_parity(subject, training, dtype):
    for module_input in subject.inputs(dtype, training, requires_grad=True):
        on_cpu = subject.prepared(module_input, dtype, training)
        on_gpu = copy.deepcopy(on_cpu).cuda()
        gpu_input = with_tensors(module_input, lambda x: x.detach().cuda().requires_grad_())
        exact_input = with_tensors(module_input, lambda x: x.detach().double().requires_grad_())
        exact = subject.stock(on_cpu, module_input).double()
        stock = subject.stock(on_gpu, module_input)
        grads = [torch.randn_like(y) for y in tree_leaves(run(on_cpu, module_input))]
        gpu_grads = [g.cuda() for g in grads]

        def results(module, given, grad_outputs):
            if not training and subject.info.module_cls in LAYERS:  # cuDNN goes backward in training only
                return tree_leaves(run(module, given))
            return tree_leaves(gradients(module, given, grad_outputs))

        with tf32_off():
            found = results(on_gpu, gpu_input, gpu_grads)
            same_device = results(stock, gpu_input, gpu_grads)
        tolerance = {torch.float32: 5e-2, torch.float64: 4e-4}[dtype]  # PyTorch's of this test
        for ours, cpu in zip(found, results(on_cpu, module_input, grads), strict=True):
            torch.testing.assert_close(ours.cpu(), cpu, rtol=0, atol=tolerance)
        exact = results(exact, exact_input, [g.double() for g in grads])
        for k, (ours, torchs, x) in enumerate(zip(found, same_device, exact, strict=True)):
            assert_accurate(f"tensor {k}", ours.detach(), torchs.detach(), x.detach())
