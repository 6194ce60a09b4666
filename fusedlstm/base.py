"""What all layers and cells share: the parameters and conventions of `torch.nn`, but no arithmetic."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from fusedlstm import cells, checks, engines, functional, inits, sequences, transforms
from fusedlstm.engines import aten
from fusedlstm.noise import NO_RATES, Rates

State = Tensor | tuple[Tensor, ...]  # h alone is a tensor, as in torch.nn
States = TypeVar("States", bound=State)  # that of a class: Recurrent[Tensor], Recurrent[tuple[Tensor, Tensor]]
Sequences = TypeVar("Sequences", Tensor, PackedSequence)
# Any: a function may be made for one class of modules.
Init = Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None
Device = torch.device | str | int | None


class _CheckedAttributes(nn.Module):
    """Checks attributes that are set after construction in the same way as the arguments of the constructor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            value = _CHECKS[name](value)
        elif name in _FIXED:
            checks.unchanged(name, getattr(self, name), value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        of_torch = getattr(super(), "__getstate__", None)  # which not every class has before Python 3.11
        state = vars(self) if of_torch is None else of_torch()
        return state | {"init": tuple(map(inits.portable, state["init"]))} if "init" in state else state


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "backend": checks.backend,
    "grad_clip": checks.grad_clip,
    "save": checks.save,
    "init": checks.init,
}
# Parameters have the shape of the one; the constructor checks the other as a whole.
_FIXED = ("num_heads", "rates")


class Recurrent(_CheckedAttributes, nn.RNNBase, Generic[States]):
    """A stack of recurrent layers of any cell, with the conventions of `torch.nn`. A subclass names its cell.

    Example::

        class MyGRU(fusedlstm.Recurrent):
            cell = "gru"  # or a cell of your own, see `fusedlstm.register_cell`

        output, h_n = MyGRU(10, 20, num_layers=2, bidirectional=True)(torch.randn(5, 3, 10))

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: As in
            `torch.nn.GRU`.
        backend: The engine: "auto", "triton", "torch" or "reference" (see `fusedlstm.engines`). With "auto" the package
            chooses. An engine that you name serves the call or raises an error.
        grad_clip: In the backward, every element of the gradient of a state that enters a step is limited to the range
            from -grad_clip to grad_clip. None is no limit. With a scaled loss (`GradScaler`) this limits the scaled
            gradient.
        save: What the kernels and our own loops keep for the backward. "gates" is faster. "states" needs less memory,
            but the backward computes the gates again, which takes one more product. If ATen serves the call, this has
            no effect.
        num_heads: The number n of heads. The hidden units form n groups of DH = H / n units, and each group sees only
            its own h, so the recurrent weight is block diagonal. Unit u belongs to head u // DH. `weight_hh_l*` is
            [G*H, DH] and has a column for every unit of the row's head. 1 is the usual layer.
        init: A function of the module that changes its initial values, or a list of such functions (see
            `fusedlstm.inits`). They run after torch's initial values were drawn, which are uniform in ±1 / sqrt(H).
        zoneout: The probability with which a unit of a state keeps its previous value. Two numbers are for h and for
            the other states. Evaluation takes the expected value (Krueger et al. 2016).
        candidate_dropout: The probability with which the value that a unit offers to its memory is dropped. Every step
            has a new mask (Semeniuta et al. 2016).
        recurrent_dropout: The probability with which an element of the h that enters the recurrent product is dropped.
            All steps of a sequence have the same mask (Gal & Ghahramani 2016).
        weight_dropout: The probability with which an element of `weight_hh` is dropped, with one mask per call (Merity
            et al. 2017). The three dropouts divide the rest by 1 - p, and do nothing in evaluation. All masks repeat
            under `torch.manual_seed`, and all engines of a device draw the same ones (see `fusedlstm.noise`). Zoneout
            and the dropouts cannot be combined with `proj_size`.

    Parameters: Each layer and direction has `weight_ih_l*` [G*H, I], `weight_hh_l*` [G*H, H / n], `bias_ih_l*` and
        `bias_hh_l*`, each [G*H], and then the vectors of the cell, each [H]. G is the number of gates, and the rows are
        in the order of the gates.
    Shapes: L is the number of layers and D the number of directions. `input` is [T, B, I], or [B, T, I] with
        `batch_first`, or [T, I] without a batch, or a PackedSequence. Every initial state is [L * D, B, H], or without
        B, and zero if it is not given. `output` is [T, B, D * H], or has the form of `input`. The final states have the
        shapes of the initial ones. A cell that has only h takes and returns a tensor. The others take and return a
        tuple, with h first.
    Precision: Products have the dtype of `input`. On the engine "triton", sums, gates and the states beside h are
        float32.
    Raises:
        ValueError, TypeError: An argument is wrong. The text names the argument, what was expected and what came.
            Where `torch.nn` has an error for it, type and text are the same.
    """

    cell: str
    # Of a module that was made without our constructor.
    backend: str = "auto"
    grad_clip: float | None = None
    save: str = "gates"
    num_heads: int = 1
    init: Init = ()
    rates: Rates = NO_RATES
    _flat_weights: list[Tensor]  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        grad_clip: float | None = None,
        save: str = "gates",
        num_heads: int = 1,
        init: Init = None,
        zoneout: float | tuple[float, float] = 0.0,
        candidate_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        cell, size = checks.cell(self.cell), getattr(self, "proj_size", 0)  # which a subclass has set, if it has one
        # By name, for a subclass may have a class of torch.nn between this one and nn.RNNBase; and as an LSTM on the
        # meta device, for torch checks the arguments, but knows neither all cells nor heads.
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            size,
            "meta",
            dtype,
        )
        self.mode = cell.upper()
        self.backend, self.grad_clip, self.save, self.init = backend, grad_clip, save, init
        rates = checks.rates(cell, zoneout, candidate_dropout, recurrent_dropout, weight_dropout, size)
        vars(self).update(num_heads=checks.num_heads(num_heads, hidden_size, size, cell), rates=rates)
        self._make_parameters(device, dtype)
        self.reset_parameters()

    def _make_parameters(self, device: Device, dtype: torch.dtype | None) -> None:
        self._parameters.clear()
        self._flat_weights_names, self._all_weights = [], []
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: self._directions]:
                shapes = {f"{name}_l{layer}{suffix}": shape for name, shape in self._shapes(layer).items()}
                for name, shape in shapes.items():
                    self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._all_weights.append([*shapes])
                self._flat_weights_names.extend(shapes)
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw new initial values. They are torch's, changed by the functions in `init`."""
        inits.uniform_(self)
        for change in checks.init(self.init):
            change(self)

    def num_parameters(self) -> int:
        """Return the number of elements of all parameters, without looking at their values.

        It is the sum over the layers l of D (G H (I_l + H / n) + 2 G H + V H). I_l is I for the first layer and D H for
        the others. There are D directions, G gates, n heads and V vectors of the cell. Without biases the term 2 G H is
        missing. With a projection P takes the place of H / n, and of H in I_l, and each layer and direction has P H
        more.
        """
        shapes = [shape for layer in range(self.num_layers) for shape in self._shapes(layer).values()]
        return self._directions * sum(map(math.prod, shapes))

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        P = self.proj_size or self.hidden_size
        input_size = self.input_size if layer == 0 else self._directions * P
        of = cells.CELLS[self.cell]
        return _shapes(of, input_size, self.hidden_size, self.bias, self.num_heads, self.proj_size)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *_differing(self), *([str(self.rates)] if any(self.rates) else [])])

    def flatten_parameters(self) -> None:
        """Do nothing. The kernels read every weight where it is. Code for `torch.nn` calls this method."""

    @overload
    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Sequences | None = None,
        padding_side: Literal["right", "left"] = "right",
        return_cell_states: Literal[False] = False,
        return_states: Literal[False] = False,
        grad_clip: float | None = None,
    ) -> tuple[Sequences, States]: ...

    @overload
    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Sequences | None = None,
        padding_side: Literal["right", "left"] = "right",
        return_cell_states: Literal[True],
        return_states: Literal[False] = False,
        grad_clip: float | None = None,
    ) -> tuple[Sequences, States, Any]: ...

    @overload
    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Sequences | None = None,
        padding_side: Literal["right", "left"] = "right",
        return_cell_states: Literal[False] = False,
        return_states: Literal[True],
        grad_clip: float | None = None,
    ) -> tuple[Sequences, States, Any]: ...

    @overload
    def forward(
        self,
        input: Sequences,
        hx: States | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Sequences | None = None,
        padding_side: Literal["right", "left"] = "right",
        return_cell_states: bool = False,
        return_states: bool = False,
        grad_clip: float | None = None,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,  # [T, B, I], [B, T, I] or [T, I], or packed
        hx: State | None = None,  # each [L * D, B, H], or [L * D, H]
        *,
        lengths: Tensor | None = None,  # [B] integers
        resets: Tensor | PackedSequence | None = None,  # bool, [T, B], [B, T] or [T], or packed like input
        padding_side: Literal["right", "left"] = "right",
        return_cell_states: bool = False,
        return_states: bool = False,
        grad_clip: float | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over a sequence. The class describes the shapes.

        Args:
            input: The sequences, in the dtype of the parameters, or in any dtype under autocast. A nested tensor
                [B, *, I] with `layout=torch.jagged` has its own lengths, and `output` is jagged too.
            hx: The initial states. They are zero if they are not given.
            lengths: The number of valid steps of each sequence, integers [B] from 0 to T, on any device. Later steps
                are padding. `output` is zero there, and the final state is the one after the last valid step, or `hx`
                if there is none. The reverse direction starts at the last valid step. The results equal those of
                packing. The padding should hold finite values. Lengths on the host are checked. Lengths on another
                device are not checked, because that would wait for the device. There, and inside of a compiled graph, a
                length below 0 counts as 0 and one above T as T. With `FUSEDLSTM_DEBUG=1` they are checked on a device
                too.
            resets: Where a sequence starts anew, bool, with the leading axes of `input`. Numbers count as true
                unless they are 0, so the dones of an environment can be given. True at step t cuts the
                sequence between steps t - 1 and t. In the forward direction the state that enters step t is zero, and
                at t = 0 `hx` is ignored. In the reverse direction the state that enters step t - 1 is zero. No gradient
                crosses the cut.
            padding_side: "right" if the padding of `lengths` is after the valid steps, "left" if it is before them, as
                in `torch.nn.utils.rnn.pad_sequence`. `resets` lie as `input` does.
            return_cell_states: Whether to return the states beside h of every step of the last layer too.
            return_states: Whether to return all states of every step and layer too. The t-th of each is what enters
                step t + 1, and has the shape of `hx`: so a stack can go on from the middle of a sequence.
            grad_clip: The limit for this call. None takes that of the module.

        Returns:
            `output` and the final states. With `return_cell_states` also the states beside h, each [T, B, D * H] or of
            the form of `output`: a tensor if there is one such state, else a tuple. With `return_states` instead
            the states as in `hx`, each [T, L * D, B, H], or [T, L * D, H] without a batch, or packed [R, L * D, H].
            `batch_first` does not change that. All states are zero in padding.

        Raises:
            ValueError, RuntimeError, TypeError: A shape, dtype or device is wrong. Type and text are those of
                `torch.nn` where it has such an error.
        """
        if isinstance(input, Proxy):
            masks = {"lengths": lengths, "resets": resets, "padding_side": padding_side}
            wanted = {"return_cell_states": return_cell_states, "return_states": return_states, "grad_clip": grad_clip}
            return _as_a_leaf(self, input, hx, **masks, **wanted)
        if isinstance(input, Tensor) and input.is_nested:
            checks.with_jagged_input(input, lengths, resets, return_states)
            return self._of_jagged(input, hx, return_cell_states=return_cell_states, grad_clip=grad_clip)
        masked = lengths is not None or resets is not None or padding_side != "right"
        asks_more = masked or return_cell_states or return_states or grad_clip is not None
        if isinstance(input, Tensor) and not asks_more and self._is_plain(input, hx):
            return self._by_aten(input, hx)
        spec = self._spec(return_cell_states, return_states, grad_clip)
        *call, restore = self._prepared(input, hx, lengths, resets, padding_side)
        output, states, of_steps = restore(*functional.run(spec, *call))
        if return_states:
            of_steps = tuple(map(self._of_layers, of_steps))
        return (output, states, _state(of_steps)) if spec.sequences else (output, states)

    if TYPE_CHECKING:  # torch says of every call that it returns Any
        __call__ = forward

    def _is_plain(self, input: Tensor, hx: State | None) -> bool:
        """Whether ATen's layers take a call on a CPU as it stands.

        `functional.run` finds the same, but it asks more. A small layer takes less time than that, because the code of
        the questions is seldom in the caches of the processor.
        """
        of = cells.CELLS[self.cell]
        return not (
            of.aten is None
            or of.equations.step_backward is None
            or (of.aten != "lstm" and torch.is_grad_enabled())
            or type(input) is not Tensor
            or not input.is_cpu
            or input.layout is not torch.strided
            or input.dim() != 3
            or input.size(2) != self.input_size
            or input.size(1 if self.batch_first else 0) < 2
            or input.dtype not in (torch.float32, torch.float64)
            or self.grad_clip is not None
            or self.num_heads > 1
            or any(self.rates)
            or engines.requested(self.backend) not in ("auto", "torch")
            or (self._asks_more_of_a_graph(input) if _in_a_graph() else engines.LOGGER.isEnabledFor(logging.DEBUG))
            or torch.is_autocast_enabled("cpu")
            or transforms.transformed()
            or transforms.takes_tangents(input)
            or transforms.wants_grad_samples(self._parameters.values())
        )

    def _asks_more_of_a_graph(self, input: Tensor) -> bool:
        """Whether a graph is traced in which a plain call needs more than `functional.run_compiled`."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return True
        draws = self.training and self.dropout > 0 and self.num_layers > 1
        sizes = (None, self.batch_first, self.hidden_size, self.proj_size, draws)
        return aten.schedule(cells.CELLS[self.cell], input, input.dtype, *sizes) == "loop"

    def _by_aten(self, input: Tensor, hx: State | None) -> tuple[Tensor, State]:
        """`forward` of a plain call."""
        weights, compiled = self._weights(), torch.compiler.is_compiling()
        if hx is not None or weights[0].dtype is not input.dtype or not weights[0].is_cpu:
            checks.sequence(self, input, hx, weights[0])
        if not compiled:
            self._check_parameters(weights)
        of, batch = cells.CELLS[self.cell], input.size(0 if self.batch_first else 1)
        states = self._zeros(input, batch) if hx is None else as_states(hx)
        dropout, order = self.dropout if self.training else 0.0, (self.bidirectional, self.batch_first)
        options = (self.bias, self.num_layers, dropout)
        if compiled:
            output, states = functional.run_compiled(of, input, states, weights, *options, *order)
        else:
            output, states = aten.layers(of, input, None, states, weights, *options, self.training, *order)
        return output, _state(states)

    def _weights(self) -> list[Tensor]:
        """The parameters, in the order of `_flat_weights_names`. A parametrization is computed once."""
        if torch.compiler.is_compiling():  # a graph must not store what a transform makes of them
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights

    def _check_parameters(self, weights: list[Tensor]) -> None:
        sizes = (self.num_layers, self._directions, self.bias, self.num_heads, self.proj_size)
        shapes = _all_shapes(cells.CELLS[self.cell], self.input_size, self.hidden_size, *sizes)
        checks.parameters(weights, shapes, self._flat_weights_names)

    def _weights_have_changed(self) -> bool:
        """What torch's function of this name finds, without its search of the whole module for every weight."""
        own = self._parameters
        for ref, name in zip(self._flat_weight_refs, self._flat_weights_names, strict=True):
            weight = own.get(name)
            if weight is None and hasattr(self, name):  # asked twice as by torch: a spectral norm iterates each time
                weight = getattr(self, name)
            if weight is not None and ref is not None and ref() is not weight:
                return True
        return False

    def _of_jagged(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, ...]:
        """`forward` of a nested tensor [B, *, I]. The results of every step have its structure."""
        padded, lengths = sequences.padded_from_jagged(input, batch_first=self.batch_first)
        results: tuple[Any, ...] = self.forward(padded, hx, lengths=lengths, **options)
        output, states, *cell_states = results

        def jagged(x: Tensor) -> Tensor:
            return sequences.jagged_like(input, x, lengths, self.batch_first)

        found = [_state(tuple(map(jagged, as_states(c)))) for c in cell_states]
        return (jagged(output), states, *found)

    def _of_layers(self, sequence):
        """[T, B, L * D * H] as [T, L * D, B, H], and the like of other forms."""
        rows = self.num_layers * self._directions
        if isinstance(sequence, PackedSequence):
            return sequence._replace(data=sequence.data.unflatten(-1, (rows, -1)))
        sequence = sequence.unflatten(-1, (rows, -1))
        if sequence.dim() == 3:
            return sequence
        return sequence.permute(1, 2, 0, 3) if self.batch_first else sequence.transpose(1, 2)

    def _prepared(self, input, hx, lengths, resets, padding_side):
        """Check the arguments of `forward` and bring them into the form of `functional.run`.

        The last value that is returned is a function that brings the results of `run` into the form of `forward`.
        """
        weights = self._weights()
        checks.sequence(self, input, hx, weights[0])
        if not _in_a_graph():
            self._check_parameters(weights)
        if lengths is not None or resets is not None:
            lengths, resets = checks.lengths_and_resets(input, lengths, resets, self.batch_first)
        padded_left = checks.padding_side(padding_side, lengths) == "left"
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            hx = self._zeros(data, int(batch_sizes[0])) if hx is None else self.permute_hidden(hx, sorted_indices)

            def restore(output, states, of_steps):
                output, *of_steps = (
                    PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices) for x in (output, *of_steps)
                )
                return output, _state(self.permute_hidden(states, unsorted_indices)), of_steps

            return data, as_states(hx), weights, functional.Rows(batch_sizes=batch_sizes, resets=resets), restore
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            input, resets = input.unsqueeze(batch_dim), None if resets is None else resets.unsqueeze(batch_dim)
        if hx is None:
            hx = self._zeros(input, input.size(batch_dim))
        elif not batched:
            hx = tuple(s.unsqueeze(1) for s in as_states(hx))

        def restore(output, states, of_steps):
            if not batched:
                output, *of_steps = (x.squeeze(batch_dim) for x in (output, *of_steps))
                states = tuple(s.squeeze(1) for s in states)
            return output, _state(states), of_steps

        rows = functional.Rows(self.batch_first, None, lengths, padded_left, resets)
        return input, as_states(hx), weights, rows, restore

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        """The initial states if none are given."""
        rows = self.num_layers * self._directions
        zeros = torch.zeros(rows, batch, self.hidden_size, dtype=input.dtype, device=input.device)
        h = zeros[..., : self.proj_size] if self.proj_size else zeros
        return (h, *[zeros] * cells.CELLS[self.cell].num_cell_states)

    def _spec(self, cell_states: bool, all_states: bool, grad_clip: float | None) -> functional.Spec:
        checks.wanted_states(self.cell, cell_states, all_states)
        return functional.Spec(
            cell=cells.CELLS[self.cell],
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            dropout=self.dropout,
            rates=self.rates,
            training=self.training,
            sequences="all" if all_states else "cells" if cell_states else "",
            grad_clip=checks.grad_clip(self.grad_clip if grad_clip is None else grad_clip),
            save=self.save,
            backend=self.backend,
        )

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:
        """Return the states, each [L * D, B, H], in another order of the batch. Code for `torch.nn` calls this."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple(s.index_select(1, permutation) for s in hx)


class RecurrentCell(_CheckedAttributes, nn.RNNCellBase, Generic[States]):
    """One step of any cell, with the conventions of `torch.nn`. A subclass names its cell.

    Example::

        class MyGRUCell(fusedlstm.RecurrentCell):
            cell = "gru"  # or a cell of your own, see `fusedlstm.register_cell`

        h = MyGRUCell(10, 20)(torch.randn(3, 10))  # [B, I] -> [B, H]

    Args:
        input_size, hidden_size, bias, device, dtype: As in `torch.nn.GRUCell`.
        backend, num_heads, init: As in :class:`Recurrent`.

    Parameters: They are those of one layer of :class:`Recurrent`, and their names have no `_l0`.
    Shapes: `input` is [B, I] or [I]. Every state is [B, H] or [H], and zero if it is not given. The call returns the
        new states. A cell that has only h takes and returns a tensor. The others take and return a tuple, with h first.
    """

    cell: str
    # Of a module that was made without our constructor.
    backend: str = "auto"
    num_heads: int = 1
    init: Init = ()

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        num_heads: int = 1,
        init: Init = None,
    ) -> None:
        num_chunks = cells.CELLS[self.cell].num_gates
        nn.RNNCellBase.__init__(  # by name and on the meta device, as in Recurrent
            self, input_size, hidden_size, bias, num_chunks=num_chunks, device="meta", dtype=dtype
        )
        self.backend, self.init = backend, init
        vars(self)["num_heads"] = checks.num_heads(num_heads, hidden_size, cell=self.cell)
        for name, shape in self._shapes().items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values. They are torch's, changed by the functions in `init`."""
        inits.uniform_(self)
        for change in checks.init(self.init):
            change(self)

    def num_parameters(self) -> int:
        """Return the number of elements of all parameters, G H (I + H / n) + 2 G H + V H.

        The letters are those of :meth:`Recurrent.num_parameters`.
        """
        return sum(map(math.prod, self._shapes().values()))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(cells.CELLS[self.cell], self.input_size, self.hidden_size, self.bias, self.num_heads)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *_differing(self)])

    def forward(
        self,
        input: Tensor,  # [B, I] or [I]
        hx: States | None = None,  # each [B, H] or [H]
    ) -> States:
        """Run one step and return the new states. The class describes the shapes.

        Raises:
            ValueError, RuntimeError, TypeError: A shape, dtype or device is wrong. Type and text are those of
                `torch.nn` where it has such an error.
        """
        if isinstance(input, Proxy):
            return _as_a_leaf(self, input, hx)
        checks.step(self, input, hx)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
        of = cells.CELLS[self.cell]
        if hx is None:
            zeros = torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)
            states = (zeros,) * len(of.states)
        else:
            states = as_states(hx) if batched else tuple(s.unsqueeze(0) for s in as_states(hx))
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()), *of.vectors)
        weights = [getattr(self, name) for name in names]
        if not _in_a_graph():
            sizes = (1, 1, self.bias, self.num_heads, 0)
            checks.parameters(weights, _all_shapes(of, self.input_size, self.hidden_size, *sizes), names)
        states = functional.step(functional.Spec(of, backend=self.backend), input, states, weights)
        return _state(states if batched else tuple(s.squeeze(0) for s in states))

    if TYPE_CHECKING:  # as in Recurrent
        __call__ = forward


def _shapes(
    of: cells.Cell, input_size: int, hidden_size: int, bias: bool, num_heads: int, proj_size: int = 0
) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer and direction, in order."""
    rows = of.num_gates * hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (rows, input_size),
        "weight_hh": (rows, proj_size or hidden_size // num_heads),
    }
    shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {}
    shapes |= {"weight_hr": (proj_size, hidden_size)} if proj_size else {}
    return shapes | {name: (blocks * hidden_size,) for name, blocks in of.vector_blocks.items()}


@functools.lru_cache(maxsize=1024)
def _all_shapes(
    of: cells.Cell,
    input_size: int,
    hidden_size: int,
    layers: int,
    directions: int,
    bias: bool,
    num_heads: int,
    proj_size: int,
) -> tuple[tuple[int, ...], ...]:
    """The shapes of all parameters, in the order of `_flat_weights`."""
    found: list[tuple[int, ...]] = []
    for layer in range(layers):
        own_input_size = input_size if layer == 0 else directions * (proj_size or hidden_size)
        found += [*_shapes(of, own_input_size, hidden_size, bias, num_heads, proj_size).values()] * directions
    return tuple(found)


def _in_a_graph() -> bool:
    """Whether a call is compiled or traced. The shapes of parameters are constants there, and not checked."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _as_a_leaf(module: nn.Module, input: Proxy, hx: Any, **options: Any) -> Any:
    """What `torch.fx.symbolic_trace` gets: it takes our modules whole, as it takes those of `torch.nn`."""
    tracer: Any = input.tracer
    given = {k: x for k, x in options.items() if not (x is None or x is False or (isinstance(x, str) and x == "right"))}
    return tracer.create_proxy(
        "call_module", tracer.path_of_module(module), (input,) if hx is None else (input, hx), given
    )


def as_states(hx: State) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _state(states: Sequence[Any]) -> Any:  # a State, or the like of packed sequences
    return states[0] if len(states) == 1 else tuple(states)


def _differing(module: Recurrent | RecurrentCell) -> list[str]:
    """The options of a module that differ from their defaults, as `repr` shows them."""
    defaults = {"num_heads": 1, "backend": "auto", "grad_clip": None, "save": "gates"}
    differing = {k: getattr(module, k, default) for k, default in defaults.items()}
    texts = [f"{k}={v}" for k, v in differing.items() if v != defaults[k]]
    names = [_function_name(change) for change in checks.init(module.init)]
    return [*texts, f"init={names[0] if len(names) == 1 else names}"] if names else texts


def _function_name(function: Callable[..., Any]) -> str:
    """Of what a `functools.partial` calls, too."""
    return getattr(getattr(function, "func", function), "__name__", repr(function))
