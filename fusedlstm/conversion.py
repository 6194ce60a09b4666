"""Replace layers of `torch.nn` by ours, in models that exist and in code that builds models, and back again."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusedlstm import checks
from fusedlstm.base import Recurrent, RecurrentCell
from fusedlstm.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, cls.__name__): cls for cls in (LSTM, LSTMCell, GRU, GRUCell, RNN, RNNCell)
}


class PatchedLSTM(LSTM, nn.LSTM):  # type: ignore[misc]
    """An instance of our LSTM and of `torch.nn.LSTM`.

    `torch.nn.LSTM(...)` builds it under :func:`patch_torch`, and :func:`convert` makes it with `keep_isinstance`.
    """


class PatchedLSTMCell(LSTMCell, nn.LSTMCell):
    """As :class:`PatchedLSTM`, for `torch.nn.LSTMCell`."""


class PatchedGRU(GRU, nn.GRU):
    """As :class:`PatchedLSTM`, for `torch.nn.GRU`."""


class PatchedGRUCell(GRUCell, nn.GRUCell):
    """As :class:`PatchedLSTM`, for `torch.nn.GRUCell`."""


class PatchedRNN(RNN, nn.RNN):
    """As :class:`PatchedLSTM`, for `torch.nn.RNN`."""


class PatchedRNNCell(RNNCell, nn.RNNCell):
    """As :class:`PatchedLSTM`, for `torch.nn.RNNCell`."""


PATCHED: dict[Any, type[nn.Module]] = {
    cls.__bases__[1]: cls
    for cls in (PatchedLSTM, PatchedLSTMCell, PatchedGRU, PatchedGRUCell, PatchedRNN, PatchedRNNCell)
}

_TO_OURS = CLASSES | {patched: CLASSES[stock] for stock, patched in PATCHED.items()}
_TO_BOTH = PATCHED | {CLASSES[stock]: patched for stock, patched in PATCHED.items()}
_TO_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    cls: stock for table in (CLASSES, PATCHED) for stock, cls in table.items()
}
_Model = TypeVar("_Model", bound=nn.Module)
_RECURRENT = tuple(stock.__name__ for stock in CLASSES)
_OURS = (Recurrent, RecurrentCell)

_lock = threading.Lock()
_entered: dict[object, str] = {}  # the backend of every patch_torch; no stack, since threads leave in any order
_constructors: dict[Any, Callable[..., None]] = {}  # torch's, while ours stand in for them


@dataclass(frozen=True)
class Report:
    """What :func:`convert` or :func:`restore` did. `print` shows one line per module.

    The keys are the names of `model.named_modules()`. The name of the model itself is "".

    Attributes:
        replaced: For each module that was replaced, the class before and the class after, as text.
        kept: For each recurrent module that was not replaced, the reason. Other modules are not listed.
    """

    replaced: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: {change}" for name, change in self.replaced.items()]
        lines += [f"{name or '(model)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "nothing to replace"


@overload
def convert(
    model: _Model, *, backend: str = "auto", keep_isinstance: bool = False, return_report: Literal[False] = False
) -> _Model: ...
@overload
def convert(
    model: _Model, *, backend: str = "auto", keep_isinstance: bool = False, return_report: Literal[True]
) -> tuple[_Model, Report]: ...
def convert(
    model: _Model, *, backend: str = "auto", keep_isinstance: bool = False, return_report: bool = False
) -> _Model | tuple[_Model, Report]:
    """Replace every LSTM, GRU and RNN of `torch.nn` in `model`, and their cells, by ours. `model` changes in place.

    Only the class of each module changes, and the module gets the attribute `backend`. It stays the same object with
    the same parameters, buffers, hooks, pruning and weight norm, so optimizers and other modules that hold it need no
    change. `isinstance(module, torch.nn.LSTM)` is false afterwards, unless you ask for `keep_isinstance`.

    If the model already ran under `torch.compile`, its results stay right. But Dynamo does not look again at a function
    in which it broke the graph at `torch.nn.LSTM`. So convert before the first call, or call `torch.compiler.reset()`
    after the conversion.

    Example::

        model = fusedlstm.convert(model)

        layer, report = fusedlstm.convert(torch.nn.LSTM(10, 20), return_report=True)
        print(report)  # (model): torch.nn.LSTM -> fusedlstm.LSTM

    Args:
        model: The model, or a single `torch.nn.LSTM`. The function also finds modules inside of wrappers (DataParallel,
            DDP, FSDP, `torch.compile`).
        backend: The engine of every module that is replaced, as in :class:`Recurrent`.
        keep_isinstance: Whether the modules stay instances of the classes of `torch.nn` as well, for code that asks for
            them, such as TorchRL's `LSTMModule`. Dynamo breaks the graph at such instances.
        return_report: Whether to return a :class:`Report` too.

    Returns:
        `model`, which is the same object. With `return_report` the pair (model, report). The report lists what was
        replaced, and why every other recurrent module was kept: for example a subclass, or a quantized or scripted
        module. A module with several names is listed under the first.

    Raises:
        TypeError: `model` is not a module.
        ValueError: There is no such `backend`.
    """
    checks.backend(backend)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    compiled: list[str] = []
    for name, module in _named_modules(model).items():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            compiled.append(name)
        before = parametrize.type_before_parametrizations(module)
        target = (_TO_BOTH if keep_isinstance else _TO_OURS).get(before)
        why = _why_not_ours(module, before) if target is None else _why_untouched(module)
        if why is not None:
            kept[name] = why
        elif target is not None:
            replaced[name] = _assign_class(module, target)
            vars(module)["backend"] = backend
            if any(_inside(name, wrapper) for wrapper in compiled):
                replaced[name] += "; if it ran compiled before, torch.compiler.reset() lets Dynamo look again"
    return (model, Report(replaced, kept)) if return_report else model


@overload
def restore(model: _Model, *, return_report: Literal[False] = False) -> _Model: ...
@overload
def restore(model: _Model, *, return_report: Literal[True]) -> tuple[_Model, Report]: ...
def restore(model: _Model, *, return_report: bool = False) -> _Model | tuple[_Model, Report]:
    """Replace our LSTM, GRU, RNN and their cells in `model` by those of `torch.nn`. `model` changes in place.

    This undoes :func:`convert` and :func:`patch_torch`, and it also works on models that were built with our classes.
    It is for tools that look for the class `torch.nn.LSTM`: `torch.jit.script`, quantization and exporters. The
    attributes `backend`, `save` and `init` are lost. A module is kept if it has `grad_clip`, zoneout, a dropout inside
    of a step or heads, or if `torch.nn` does not have its cell. If the model was built or moved to a GPU while it had
    our classes, call `flatten_parameters()` before it runs on cuDNN, which prefers its weights in one piece of memory.

    Args:
        model: The model, or a single layer or cell.
        return_report: Whether to return a :class:`Report` too.

    Returns:
        `model`, which is the same object. With `return_report` the pair (model, report). The report lists what was
        replaced, and why every other module of ours was kept.

    Raises:
        TypeError: `model` is not a module.
    """
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, module in _named_modules(model).items():
        if not isinstance(module, _OURS):
            continue
        before = parametrize.type_before_parametrizations(module)
        target = _TO_STOCK.get(before)
        why = _why_not_stock(before) if target is None else _why_untouched(module)
        if why is None and getattr(module, "grad_clip", None) is not None:
            why = "torch.nn has no grad_clip"
        if why is None and any(getattr(module, "rates", ())):
            why = "torch.nn has no zoneout and no dropout inside of a step"
        if why is None and module.num_heads > 1:
            why = "torch.nn has no heads (fusedlstm.dense_weight gives the weights of a dense layer)"
        if why is not None:
            kept[name] = why
        elif target is not None:
            replaced[name] = _assign_class(module, target)
            for ours in ("backend", "grad_clip", "save", "num_heads", "init", "rates"):
                vars(module).pop(ours, None)
    return (model, Report(replaced, kept)) if return_report else model


@contextlib.contextmanager
def patch_torch(*, backend: str = "auto") -> Iterator[None]:
    """Inside of this context, `torch.nn.LSTM(...)`, `GRU(...)`, `RNN(...)` and their cells build ours.

    This is for code of other libraries that builds its own layers, however it imports the names. A layer that is built
    inside is an instance of both `torch.nn.LSTM` and `fusedlstm.LSTM`. Subclasses of `torch.nn.LSTM`, copies and loaded
    files are not changed. The context acts on the whole process with all its threads. It is also a decorator. It can be
    nested, and `torch.nn` is restored when the last context is left.

    Dynamo breaks the graph at every instance of `torch.nn.LSTM`, and therefore at these layers too. :func:`convert`
    makes each of them a plain `fusedlstm.LSTM`, which does not break the graph.

    Example::

        with fusedlstm.patch_torch():
            model = third_party.Model()

    Args:
        backend: The engine of the modules that are built inside. In nested contexts, the one that was entered last
            counts for all.

    Raises:
        ValueError: There is no such `backend`.
    """
    checks.backend(backend)
    entry = object()
    with _lock:
        if not _entered:
            for stock in PATCHED:
                _constructors[stock] = stock.__init__
                stock.__init__ = _constructor(stock)
        _entered[entry] = backend
    try:
        yield
    finally:
        with _lock:
            del _entered[entry]
            if not _entered:
                for stock, constructor in _constructors.items():
                    stock.__init__ = constructor


def _constructor(stock: Any) -> Callable[..., None]:
    # __init__ and not __new__: a class from which __new__ was deleted no longer takes arguments (CPython 3.11), and
    # copies and loaded files pass through __new__ as well.
    constructor = stock.__init__

    @functools.wraps(constructor)
    def __init__(self, *args, **kwargs) -> None:
        if type(self) is not stock:
            constructor(self, *args, **kwargs)
            return
        with _lock:
            backend = next(reversed(_entered.values()), "auto")
        self.__class__ = PATCHED[stock]
        self.__init__(*args, backend=backend, **kwargs)

    return __init__


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(checks.module(model).named_modules())


def _inside(name: str, wrapper: str) -> bool:
    return wrapper == "" or name == wrapper or name.startswith(wrapper + ".")


def _assign_class(module: nn.Module, target: type[nn.Module]) -> str:
    """Make `module` a `target`. Returns the names of both classes, as text."""
    change = f"{_class_name(parametrize.type_before_parametrizations(module))} -> {_class_name(target)}"
    if parametrize.is_parametrized(module):
        # As parametrize makes it: a class of its own with a property a parameter, under the class it goes back to.
        target = type(f"Parametrized{target.__name__}", (target,), dict(vars(type(module))))
    module.__class__ = target
    return change


def _class_name(cls: type) -> str:
    """The name that a user imports."""
    return f"{cls.__module__.removesuffix('.rnn').removesuffix('.modules')}.{cls.__qualname__}"


def _why_untouched(module: nn.Module) -> str | None:
    # Libraries that offload or trace put a function bound to the old class there.
    return "its forward was replaced on the object" if "forward" in vars(module) else None


def _why_not_ours(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why a module of a class that is not in the table stays, or None if it is not recurrent."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule: convert before scripting" if module.original_name in _RECURRENT else None
    for base in cls.__mro__:
        if base.__module__.startswith("torch.ao.nn.") and base.__name__ in _RECURRENT:
            return f"{_class_name(base)}: quantized, or prepared for it"
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return None
    if isinstance(module, _OURS):
        return "already fusedlstm"
    if cls.__module__ == nn.RNNBase.__module__:
        return f"{_class_name(cls)} has no counterpart here"
    return _own_code(cls)


def _why_not_stock(cls: type[nn.Module]) -> str:
    """Why one of ours that is not in the table stays."""
    return f"torch.nn has no {cls.__name__}" if cls.__module__ == LSTM.__module__ else _own_code(cls)


def _own_code(cls: type[nn.Module]) -> str:
    return f"a subclass, {cls.__name__}, with code of its own"


def dense_weight(weight_hh: Tensor, hidden_size: int) -> Tensor:
    """Return the recurrent weight of a layer without heads that computes the same as a layer with heads.

    Example::

        lstm, dense = fusedlstm.LSTM(10, 20, num_heads=4), torch.nn.LSTM(10, 20)
        weights = lstm.state_dict()
        weights["weight_hh_l0"] = fusedlstm.dense_weight(weights["weight_hh_l0"], 20)
        dense.load_state_dict(weights)

    Args:
        weight_hh: The recurrent weight [G * H, DH] of a layer with H / DH heads and G gates.
        hidden_size: H.

    Returns:
        The weight [G * H, H] of the dense layer, with zeros between different heads, in the dtype of `weight_hh`.
    """
    rows, DH = weight_hh.shape
    head = torch.arange(hidden_size, device=weight_hh.device) // DH  # of every unit
    same_head = (head.unsqueeze(1) == head).repeat(rows // hidden_size, 1)  # [G * H, H]
    return weight_hh.repeat(1, hidden_size // DH).masked_fill(~same_head, 0)
