"""A kernel with everything that stays the same from launch to launch, so that a launch costs the host little.

Triton's `kernel[grid](...)` looks at every argument to find the compiled kernel that fits. That takes 40 microseconds
for the 65 arguments of a loop. Here the compiled kernels are kept in a dict, by everything that can differ. This relies
on two properties of Triton 3.6.0 and 3.7.1 (`tests/compiled/test_bound.py` fails if they change):

- `kernel.warmup(..., grid=...)` returns a `CompiledKernel`, and `compiled[grid](*arguments)` launches it. The arguments
  are all of the kernel's, in their order, with its constants. Triton's tutorial of the fused softmax does the same.
- A kernel is compiled for the dtype of a pointer and whether it is divisible by 16, and for the type of a number. An
  integer has 32 bits if it fits, else 64. The value of a number matters only if `do_not_specialize` does not name it.
  It names all numbers of ours.

At every launch Triton also checks the settings of its compiler, and whether a global of a kernel has changed. Here this
is checked once per kernel. Hooks of launches are called. A kernel with hooks before a run, or one that is interpreted,
is launched by `kernel[grid](...)`.
"""

import contextlib
import functools
import operator
from collections.abc import Callable

import torch
import triton
from triton import JITFunction
from triton.compiler import CompiledKernel

from fusedlstm.engines import failures

INT32 = 2**31 - 1
_DTYPE, _ADDRESS = operator.attrgetter("dtype"), operator.methodcaller("data_ptr")


class Bound:
    """A kernel with its compile-time arguments, its options and its grid; `plan` is what they follow from, in words."""

    def __init__(self, kernel, grid: tuple[int, ...], constants: dict, options: dict, plan: str = "") -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, (*grid, 1, 1)[:3], constants, options
        self.plan = plan
        self.spill_bytes = 0  # of a thread, once it is compiled
        self._runs: dict[tuple, Callable] = {}
        if isinstance(kernel, JITFunction):
            names = [name for name in kernel.arg_names if name not in constants]
            self._pointers = operator.itemgetter(*(name for name in names if name.endswith("_ptr")))
            self._numbers = [name for name in names if not name.endswith("_ptr")]
            self._in_order = operator.itemgetter(*kernel.arg_names)

    def __call__(self, **arguments) -> None:
        """Launch it, on the current device and stream.

        Raises:
            LaunchError: it cannot be launched.
        """
        self.launcher(arguments)()

    def launcher(self, arguments: dict, varying: str | None = None) -> Callable[..., None]:
        """A function that launches it at every call, with the value of the argument `varying` if there is one.

        `arguments` has a value of it too, of the same type.
        """
        everything = {**self.constants, **arguments}
        run, smem_bytes = self._compiled(everything)
        before = after = ()
        if run is None:
            plain, given = self.kernel[self.grid], everything | self.options

            def run(*value):
                plain(**given | dict(zip((varying,), value, strict=True)) if value else given)

        else:
            values = self._in_order(everything)
            k = len(values) if varying is None else self.kernel.arg_names.index(varying)
            before, after = values[:k], values[k + 1 :]

        def launch(*value):
            try:
                run(*before, *value, *after)
            except Exception as error:
                self._explain(error, arguments, smem_bytes)
                raise

        return launch

    def _compiled(self, everything: dict) -> tuple[Callable[..., None] | None, int | None]:
        """What launches the compiled kernel for these arguments, and its shared memory. None leaves it to Triton."""
        if not isinstance(self.kernel, JITFunction) or self.kernel.pre_run_hooks:
            return None, None
        pointers, numbers = self._pointers(everything), [everything[name] for name in self._numbers]
        key = (pointers[0].device, *map(_DTYPE, pointers), *map(type, numbers))
        addresses = [*map(_ADDRESS, pointers)]
        # Nearly always all are aligned and fit; sizes are not negative.
        if functools.reduce(operator.or_, addresses) % 16 or max(numbers, default=0) > INT32:
            key += (*[address % 16 == 0 for address in addresses], *[x > INT32 for x in numbers])
        found = self._runs.get(key)
        if found is None:
            smem_bytes = None
            try:
                compiled = self.kernel.warmup(**everything, **self.options, grid=self.grid)
                if not isinstance(compiled, CompiledKernel):  # a hook compiled it, or another thread is at it
                    return None, None
                smem_bytes = compiled.metadata.shared
                run = compiled[self.grid]  # loads it, and so knows its registers
                self.spill_bytes = max(self.spill_bytes, 4 * compiled.n_spills)
                found = self._runs[key] = run, smem_bytes
            except Exception as error:
                self._explain(error, everything, smem_bytes, compiling=smem_bytes is None)
                raise
        return found

    def _explain(
        self, error: Exception, arguments: dict, smem_bytes: int | None = None, compiling: bool = False
    ) -> None:
        """Raise a `LaunchError` in the place of an error that is a refusal."""
        if not failures.is_refusal(error, compiling):
            return
        x, y, z = self.grid
        words = f"{self.kernel.__name__} ({self.plan})" if self.plan else self.kernel.__name__
        words += f": {x * y * z} program(s) of {self.options.get('num_warps', 4)} warps"
        words += ", all at once (cooperative)" if self.options.get("launch_cooperative_grid") else ""
        device = next(x.device for name, x in arguments.items() if name.endswith("_ptr"))
        raise failures.launch_error(error, words, device, smem_bytes) from error


def words(plan) -> str:
    """A plan, so that an error can name it."""
    tiles = f"{plan.block_b}x{plan.block_h}x{plan.block_k}"
    return f"{plan.cell} {plan.pass_}, hidden {plan.hidden}, {plan.schedule}, tiles {tiles}, protocol {plan.protocol}"


def on(device: torch.device, waits: bool = True):
    """The context of a launch: its GPU, or the interpreter.

    Programs that wait for each other are interpreted side by side.
    """
    if triton.knobs.runtime.interpret:
        from fusedlstm.engines import interpreter

        return interpreter.side_by_side() if waits and not interpreter.active() else _HERE
    is_here = device.type != "cuda" or torch.cuda.current_device() == device.index
    return _HERE if is_here else torch.cuda.device(device)


_HERE = contextlib.nullcontext()
