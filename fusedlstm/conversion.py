"""Ours in place of torch's, in models that are built already and in code that builds them; and back again."""

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
    """What `torch.nn.LSTM(...)` builds under :func:`patch_torch`: ours, and an instance of `torch.nn.LSTM` as well."""


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
    """What :func:`convert` or :func:`restore` did, by the names of `model.named_modules()`; "" is the model itself.

    Attributes:
        replaced: name -> the class before and the class after.
        kept: name -> why this recurrent module is what it was. Modules that are not recurrent are not mentioned.
    """

    replaced: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: {change}" for name, change in self.replaced.items()]
        lines += [f"{name or '(model)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "nothing to replace"


@overload
def convert(model: _Model, *, backend: str = "auto", return_report: Literal[False] = False) -> _Model: ...
@overload
def convert(model: _Model, *, backend: str = "auto", return_report: Literal[True]) -> tuple[_Model, Report]: ...
def convert(model: _Model, *, backend: str = "auto", return_report: bool = False) -> _Model | tuple[_Model, Report]:
    """Make every LSTM, GRU and RNN of `torch.nn` in `model`, and their cells, one of ours. Changes `model` in place.

    Only the class of a module changes and `backend` is added. The object stays, and with it parameters, buffers, hooks,
    pruning, weight norm, and what optimizers and other modules hold. `isinstance(module, torch.nn.LSTM)` no longer
    holds; for modules built under :func:`patch_torch` it does.

    A model that ran compiled keeps giving right results, but Dynamo does not look again at a function that it gave up
    at `torch.nn.LSTM`: convert before the first call, or call `torch.compiler.reset()` afterwards.

    Example::

        model, report = fusedlstm.convert(model, return_report=True)
        print(report)  # encoder.lstm: torch.nn.LSTM -> fusedlstm.LSTM

    Args:
        model: the model, or a `torch.nn.LSTM` itself. Wrappers (DataParallel, DDP, FSDP, `torch.compile`) are walked
            into. A module with several names is reported under the first.
        backend: of every module replaced; see `fusedlstm.engines`.
        return_report: Whether to return a :class:`Report` beside the model.

    Returns:
        `model`, the same object. With `return_report` also what was replaced, and for every other recurrent module why
        it was not: a subclass, quantized, scripted.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such `backend`.
    """
    checks.backend(backend)
    replaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    compiled: list[str] = []
    for name, module in _named_modules(model).items():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            compiled.append(name)
        before = parametrize.type_before_parametrizations(module)
        target = _TO_OURS.get(before)
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
    """Make every layer and cell of ours in `model` that `torch.nn` has one of `torch.nn` again. Changes `model` in
    place.

    The way back from :func:`convert`, :func:`patch_torch` and models built with ours, for what looks for
    `torch.nn.LSTM` by its class: `torch.jit.script`, quantization, exporters. Nothing but `backend`, `save` and `init`
    is lost. A module with `grad_clip`, zoneout or heads, or of a cell that torch has not, stays. What
    was made or moved as ours wants `flatten_parameters()` before it runs on cuDNN, which likes its weights in one
    piece.

    Args:
        return_report: Whether to return a :class:`Report` beside the model.

    Returns:
        `model`, the same object. With `return_report` also what was replaced, and for every other module of ours why
        it was not.

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
    """Inside, `torch.nn.LSTM(...)`, `GRU(...)`, `RNN(...)` and their cells build ours, however their names were
    imported.

    For third-party code that builds its own layers. What it builds is an instance of `torch.nn.LSTM` and of
    `fusedlstm.LSTM`. Subclasses of `torch.nn.LSTM`, copies and loaded files stay what they are. For the whole process,
    every thread included; also a decorator. When the last of several is left, `torch.nn` is what it was.

    Dynamo breaks the graph at instances of `torch.nn.LSTM`, and so at these. :func:`convert` makes them plain
    `fusedlstm.LSTM`, at which it does not.

    Example::

        with fusedlstm.patch_torch():
            model = third_party.Model()

    Args:
        backend: of the modules built inside; nested, the one entered last counts.

    Raises:
        ValueError: there is no such `backend`.
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
    """Make `module` a `target`; returns both names."""
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
    """The recurrent weight of a dense layer that computes the same: [G * H, DH] -> [G * H, H], zero between heads.

    Example::

        lstm, dense = fusedlstm.LSTM(10, 20, num_heads=4), torch.nn.LSTM(10, 20)
        weights = lstm.state_dict()
        weights["weight_hh_l0"] = fusedlstm.dense_weight(weights["weight_hh_l0"], 20)
        dense.load_state_dict(weights)
    """
    rows, DH = weight_hh.shape
    head = torch.arange(hidden_size, device=weight_hh.device) // DH  # of every unit
    same_head = (head.unsqueeze(1) == head).repeat(rows // hidden_size, 1)  # [G * H, H]
    return weight_hh.repeat(1, hidden_size // DH).masked_fill(~same_head, 0)
