"""A long sequence in chunks: what language-model and reinforcement-learning loops do by hand with the state."""

import torch
from torch import Tensor, nn

from fusedlstm import checks


class Stream:
    """Carries the state of a layer from chunk to chunk, so that the chunks equal one long run.

    Example::

        stream = fusedlstm.Stream(lstm)
        for chunk, begins in loader:  # [T, B, I], [T, B]
            loss = head(stream(chunk, resets=begins)).sum()
            loss.backward()  # through this chunk: truncated backpropagation through time

    Args:
        module: a `fusedlstm.LSTM` or another of the family, or whatever is called as `module(input, hx, ...)` and returns its output first and its
            state next. In one direction: the reverse one would begin with what has not come yet.
        detach: whether gradients stop at the beginning of a chunk. If not, the graph grows until `detach()` is called.
    """

    def __init__(self, module: nn.Module, *, detach: bool = True) -> None:
        checks.instance("module", module, nn.Module)
        if getattr(module, "bidirectional", False):
            raise ValueError("module: expected one direction, got a bidirectional one, which begins with the end")
        self.module = module
        self.detaches = detach
        self.state = None  # after the last chunk, as the module returns it; None is zeros

    def __call__(self, input: Tensor, **options):
        """Run a chunk; `options` are those of the module. Returns what it returns, without the state."""
        output, state, *more = self.module(input, self.state, **options)
        self.state = state
        if self.detaches:
            self.detach()
        return (output, *more) if more else output

    def detach(self) -> None:
        """Let no gradient flow further back than here."""
        self._change(Tensor.detach)

    def reset(self, which: Tensor | None = None) -> None:
        """Begin anew: all sequences, or those where `which` is true, [B] bool ([1] or [] without a batch axis).

        Inside a chunk, that is `resets=`.
        """
        if which is None:
            self.state = None
            return
        checks.instance("which", which, Tensor)
        if which.dtype != torch.bool:
            raise ValueError(f"which: expected torch.bool, got {which.dtype}")
        if self.state is None:
            return
        state = self.state if isinstance(self.state, Tensor) else self.state[0]
        batch = state.size(1) if state.dim() == 3 else 1
        if which.shape != (batch,) and (state.dim() == 3 or which.dim() > 0):
            raise ValueError(f"which: expected shape [{batch}], got {list(which.shape)}")
        which = which.to(state.device).reshape(-1, 1)
        self._change(lambda s: s.masked_fill(which, 0))

    def _change(self, f) -> None:
        """The state is a tensor, or a tuple of them."""
        if self.state is not None:
            self.state = f(self.state) if isinstance(self.state, Tensor) else tuple(map(f, self.state))
