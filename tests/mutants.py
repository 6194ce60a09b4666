"""Faults put into the kernels on purpose, one at a time: every one must make a test fail.

`python tests/mutants.py` works in a copy of the repository, prints which test caught each fault, and exits 1 if one
survived. Takes some minutes; not part of `make test`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each has a name, a file, a text in it, its replacement, and the tests that must fail.
MUTANTS = {
    "no wait": ("kernels/exchange.py", "< target)", "< 0)", "tests/kernels/test_exchange.py"),
    "target too low": (
        "kernels/recurrence_fwd.py",
        "GROUP * step,",
        "GROUP * step - 1,",
        "tests/kernels/test_exchange.py",
    ),
    "target too high": (
        "kernels/recurrence_bwd.py",
        "counter_ptr, GROUP * step,",
        "counter_ptr, GROUP * step + 1,",
        "tests/kernels/test_exchange.py",
    ),
    "no release: nobody arrives": (
        "kernels/exchange.py",
        'tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")',
        "pass",
        "tests/kernels/test_exchange.py",
    ),
    "norms: one slot": ("kernels/norms.py", "k % 2 *", "0 *", "tests/kernels/test_norms.py"),
    "norms: the exchange before the last is good enough": (
        "kernels/norms.py",
        ".to(tl.int32) != tag)",
        ".to(tl.int32) < tag - 2)",
        "tests/kernels/test_norms.py",
    ),
    "norms: a word's tag is that of the exchange before": (
        "kernels/norms.py",
        "tl.zeros((BLOCK_B, 1), tl.int32) + (k + 1)",
        "tl.zeros((BLOCK_B, 1), tl.int32) + k",
        "tests/kernels/test_norms.py",
    ),
    "norms: squares about a program's mean only": (
        "kernels/norms.py",
        " + sizes[q] * (means[q] - mean) * (means[q] - mean)",
        "",
        "tests/kernels/test_norms.py",
    ),
    "norms: squares less the square": (
        "kernels/norms.py",
        "square = tl.sum(centred * centred, 1)[:, None]",
        "square = tl.sum(tl.where(mask, x * x, 0.0), 1)[:, None] - own * mean * mean",
        "tests/kernels/test_norms.py",
    ),
    "exchange: takes what is there": (
        "kernels/exchange.py",
        "pending = _has_nan(x, CHUNKS) * (1 - complete)",
        "pending = 0",
        "tests/kernels/test_exchange.py",
    ),
    "exchange: a NaN is waited for": (
        "kernels/exchange.py",
        "* (1 - complete)",
        "* 1",
        "tests/kernels/test_exchange.py",
    ),
    "exchange: what is complete is not loaded again": (
        "kernels/exchange.py",
        "complete = _is_complete(p_x, mask_b & published, DOT)",
        "pending = 1 - _is_complete(p_x, mask_b & published, DOT)",
        "tests/kernels/test_exchange.py",
    ),
    "exchange: rows of nobody are waited for": (
        "kernels/exchange.py",
        "mask_b & published",
        "mask_b",
        "tests/kernels/test_exchange.py",
    ),
    "exchange: chunks are fetched before the wait": (
        "kernels/exchange.py",
        "        wait(counter_ptr, target, EXCHANGE)\n        acc = exchanged_product(p_x, mask_b, w, DOT)\n",
        "        acc = exchanged_product(p_x, mask_b, w, DOT)\n        wait(counter_ptr, target, EXCHANGE)\n",
        "tests/kernels/test_exchange.py",
    ),
    "product: chunks after the first few are left out": (
        "kernels/product.py",
        "tl.static_range(0, CHUNKS, AHEAD)",
        "tl.static_range(0, AHEAD, AHEAD)",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "split: a part is not added": (
        "kernels/product.py",
        "a, b = tl.split(tl.permute(tl.reshape(acc, (2, 2, B, N)), (2, 3, 1, 0)))\n        a, b = tl.split(a + b)",
        "a, b = tl.split(tl.permute(tl.reshape(acc, (2, 2, B, N)), (2, 3, 1, 0)))\n        a, b = tl.split(a)",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "split: of eight parts one is not added": (
        "kernels/product.py",
        "a, b = tl.split(tl.permute(a + b, (0, 1, 3, 2)))",
        "a, b = tl.split(tl.permute(a, (0, 1, 3, 2)))",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "aligned rows: padding is not written": (
        "kernels/recurrence_fwd.py",
        "(units.of_head < DHP)[None, :]",
        "(units.of_head < DH)[None, :]",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "aligned rows: the weights' padding is not zero": (
        "fusedlstm/engines/launch.py",
        "torch.nn.functional.pad(x, (0, more, 0, more * rows))",
        "torch.nn.functional.pad(x, (0, more, 0, more * rows), value=1.0)",
        "tests/kernels/test_cells.py",
    ),
    "lengths of a device are taken as they are": (
        "kernels/rows.py",
        "tl.minimum(tl.maximum(length, 0), T)",
        "length",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "the trap is left out": (
        "kernels/exchange.py",
        "        if not arrived:\n",
        "        if False:\n",
        "tests/compiled/test_critical_path.py",
    ),
    "the gradient of h is fetched after the wait": (
        "kernels/recurrence_bwd.py",
        "            dentered = cut(",
        "            fetched_grads = fetch_given(given, rows.mask, start_h, rows.start * H, S, HAS_GRAD_C_SEQ)\n"
        "            dentered = cut(",
        "tests/compiled/test_critical_path.py",
    ),
    "norms: nothing is acquired on AMD": (
        "fusedlstm/engines/launch.py",
        'ACQUIRES=plan.arch.startswith("gfx")',
        "ACQUIRES=False",
        "tests/compiled/test_norms_compile.py",
    ),
    "aligned rows: what is no unit is published": (
        "kernels/recurrence_fwd.py",
        "units.mask, HP > H)",
        "units.mask, False)",
        "tests/kernels/test_cells.py",
    ),
    "what was fetched is read before the wait": (
        "kernels/recurrence_fwd.py",
        "            fetched = fetch_tuple(preact_ptr + start * GH, offs_preact, mask, H, G)\n",
        "            fetched = fetch_tuple(preact_ptr + start * GH, offs_preact, mask, H, G)\n"
        "            tl.store(c_n_ptr + offs_state, fetched[0].to(c_n_ptr.dtype.element_ty), mask=mask)\n",
        "tests/compiled/test_critical_path.py",
    ),
    "wave: a step too early": (
        "kernels/recurrence_fwd.py",
        "GROUP * (step + 1)",
        "GROUP * step",
        "tests/kernels/test_recurrence_stack.py",
    ),
    "split: a warp's part is left out": (
        "kernels/product.py",
        "tl.arange(0, DOT.SPLIT)[:, None] * DOT.PART",
        "tl.arange(0, DOT.SPLIT)[:, None] * 0",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "no release: relaxed": ("kernels/exchange.py", 'sem="release"', 'sem="relaxed"', "tests/compiled"),
    "no acquire": ("kernels/exchange.py", 'sem="acquire"', 'sem="relaxed"', "tests/compiled"),
    "no CTA barrier before the release": (
        "kernels/exchange.py",
        "    tl.debug_barrier()\n    tl.atomic_add",
        "    tl.atomic_add",
        "tests/compiled",
    ),
    "the CTA barrier stands behind the release": (
        "kernels/exchange.py",
        '    tl.debug_barrier()\n    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")\n',
        '    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")\n    tl.debug_barrier()\n',
        "tests/kernels/test_exchange_model.py",
    ),
    "exchanged loads through L1": (
        "kernels/product.py",
        ', cache_modifier=".cg")',
        ")",
        "tests/compiled/test_critical_path.py",
    ),
    "a wait by data has no bound": (
        "kernels/exchange.py",
        "(pending != 0) & (attempts < EXCHANGE.LIMIT)",
        "pending != 0",
        "tests/kernels/test_exchange.py",
    ),
    "a wait by counter has no bound": (
        "kernels/exchange.py",
        "< target) & (spins < EXCHANGE.LIMIT)",
        "< target)",
        "tests/kernels/test_exchange.py",
    ),
    "mask of batch rows dropped": (
        "kernels/recurrence_fwd.py",
        "mask_tile = tile.mask[:, None] & units.mask[None, :]",
        "mask_tile = (tile.mask[:, None] | True) & units.mask[None, :]",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "mask of hidden units dropped": (
        "kernels/recurrence_fwd.py",
        "mask_tile = tile.mask[:, None] & units.mask[None, :]",
        "mask_tile = tile.mask[:, None] & (units.mask[None, :] | True)",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "mask of the reduction dropped": (
        "kernels/product.py",
        "k < left",
        "k < left + BLOCK_K",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "gates stored before their activation": (
        "kernels/cells/lstm.py",
        "return gates, update(gates, state, drop)",
        "return (preact_x[0] + preact_h[0], f, g, o), update(gates, state, drop)",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "tanh derivative of the wrong gate": (
        "kernels/cells/lstm.py",
        "dc * i * drop * (1.0 - g * g)",
        "dc * i * drop * g * (1.0 - g)",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "backward forgets cx": (
        "kernels/rows.py",
        "begins = step == tile.steps - 1",
        "begins = step == tile.steps",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "reverse direction runs forward": (
        "kernels/rows.py",
        "t = step + recurrence.reverse * (tile.steps - 1 - 2 * step)",
        "t = step + recurrence.reverse * 0",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "vectors have the gradient of the last block of rows": (
        "fusedlstm/gradients.py",
        "total = _added(total, torch.stack",
        "total = _added(None, torch.stack",
        "tests/cpu/test_torch_loop.py",
    ),
    "grad_weight_hh forgets hx": (
        "fusedlstm/gradients.py",
        "of_first_steps(grad_preact, direction, layout), hx,",
        "of_first_steps(grad_preact, direction, layout), 0 * hx,",
        "tests/kernels/test_recurrence.py",
    ),
    "packed: an ended sequence steps on": (
        "kernels/recurrence_fwd.py",
        "state = unless_ended(stepped, state, rows.mask, LAYOUT.UNEVEN)",
        "state = stepped",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "GRU: the reset gate's gradient without what it multiplies": (
        "kernels/cells/gru.py",
        "dpreact_n * n_h * r * (1.0 - r)",
        "dpreact_n * r * (1.0 - r)",
        "tests/kernels/test_cells.py",
    ),
    "gradients of the input's blocks go through the recurrent weight": (
        "kernels/recurrence_bwd.py",
        "p_x = later_ptr + FIRST * HP + first_of_head",
        "p_x = later_ptr + first_of_head",
        "tests/kernels/test_cells.py",
    ),
    "both directions have the vectors of the first": (
        "kernels/recurrence_fwd.py",
        "vectors_ptr + pid_d * (V * H)",
        "vectors_ptr",
        "tests/kernels/test_cells.py",
    ),
    "zoneout holds what it should not": (
        "kernels/noise.py",
        "states = (tl.where(words[0] < noise.below_h, entered[0], stepped[0]),)",
        "states = (tl.where(words[0] < noise.below_h, stepped[0], entered[0]),)",
        "tests/kernels/test_cells.py",
    ),
    "the backward draws the masks of the first direction": (
        "kernels/recurrence_bwd.py",
        "step_noise(noise, pid_d,",
        "step_noise(noise, 0,",
        "tests/kernels/test_cells.py",
    ),
    "packed: no sequence begins in reverse": (
        "kernels/recurrence_fwd.py",
        "p_h = tl.where(begins, exchanged_hx_ptr + row_state * HP + first_of_head + tile.offs * HP, p_h)",
        "p_h = p_h",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "packed: the state of an ended sequence is not fetched": (
        "kernels/rows.py",
        "fetch_state(saved, before.mask[:, None] & mask_h, S)",
        "fetch_state(saved, (before.mask & rows.mask)[:, None] & mask_h, S)",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "packed: grad_weight_hh takes one direction for the other": (
        "fusedlstm/gradients.py",
        "layout.states_before(output, hx, direction)",
        "layout.states_before(output, hx, 0)",
        "tests/kernels/test_recurrence.py",
    ),
    "projection: h_0 is forgotten": (
        "fusedlstm/functional.py",
        "preact_0=preact_0",
        "preact_0=0 * preact_0",
        "tests/kernels/test_recurrence.py",
    ),
    "ragged: padding is not zero": (
        "kernels/recurrence_fwd.py",
        "stepped = zero_padding(stepped, rows, LAYOUT)",
        "stepped = stepped",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "ragged: the padding after a tile's end is not written": (
        "kernels/recurrence_fwd.py",
        "for t in range(tile.steps, T):",
        "for t in range(tile.steps + 1, T):",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "ragged: padding has a gradient": (
        "kernels/recurrence_bwd.py",
        "dpreact = zero_padding(dpreact, rows, LAYOUT)",
        "dpreact = dpreact",
        "tests/kernels/test_cells.py",
    ),
    "resets: in reverse one step off": (
        "kernels/rows.py",
        "row = (rows.t + reverse) * batch.B",
        "row = rows.t * batch.B",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "resets: h is dropped and c is not": (
        "kernels/recurrence_fwd.py",
        "state = cut(state, rows, LAYOUT)",
        "state = state",
        "tests/kernels/test_recurrence_fwd.py",
    ),
    "resets: a gradient crosses a cut": (
        "kernels/recurrence_bwd.py",
        "dentered = cut((dstate[0] + drop_h(dh, factor, NOISE),) + dstate[1:], later, LAYOUT)",
        "dentered = (dstate[0] + drop_h(dh, factor, NOISE),) + dstate[1:]",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "clip: nothing is": (
        "kernels/recurrence_bwd.py",
        "dentered = clamp_tuple(dentered, clip)",
        "dentered = dentered",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "resets: grad_weight_hh takes the state from before the cut": (
        "fusedlstm/layout.py",
        "before.masked_fill_(cut.unsqueeze(-1), 0)",
        "before",
        "tests/kernels/test_recurrence.py",
    ),
    "recompute: no reset": (
        "kernels/recompute.py",
        "other=0) == 0)",
        "other=0) >= 0)",
        "tests/kernels/test_recompute.py",
    ),
    "recompute: the reverse direction begins with the first step": (
        "kernels/recompute.py",
        "t = step + pid_d * (steps - 1 - 2 * step)",
        "t = step",
        "tests/kernels/test_recompute.py",
    ),
    "c is rounded where blocks meet": (
        "fusedlstm/engines/launch.py",
        "new(S, D, B, H, dtype=state.cx.dtype)",
        "new(S, D, B, H)",
        "tests/kernels/test_recompute.py",
    ),
    "the gradient of c begins anew in every block": (
        "fusedlstm/autograd.py",
        "[*of_rows, grad_h, grad_c],",
        "[*of_rows, grad_h, 0 * grad_c],",
        "tests/kernels/test_recompute.py",
    ),
    "heads: grad_weight_hh takes the states of another head": (
        "fusedlstm/products.py",
        "h.unflatten(1, (num_heads, DH)).transpose(0, 1)",
        "h.unflatten(1, (num_heads, DH)).transpose(0, 1).flip(0)",
        "tests/cpu/test_heads.py",
    ),
    "step: the input's bias is forgotten": (
        "kernels/step_fwd.py",
        "preact_x = add_tuple(bias_ih, preact_x)",
        "preact_x = preact_x",
        "tests/kernels/test_step_fwd.py",
    ),
    "step: h and c of another layer": (
        "kernels/step_fwd.py",
        "row_state = first_state + pid_d * B + row",
        "row_state = pid_d * B + row",
        "tests/kernels/test_step_fwd.py",
    ),
    "step: the states by turns are one": (
        "kernels/step_bwd.py",
        "dstate_ptr + ((step + 1) % 2 *",
        "dstate_ptr + (step % 2 *",
        "tests/kernels/test_step_bwd.py",
    ),
    "step: the reverse direction takes the gradients of the step before": (
        "kernels/step_bwd.py",
        "row_later = row_seq + forward * B * D",
        "row_later = row_seq + B * D",
        "tests/kernels/test_step_bwd.py",
    ),
    "step: given gradients of final states are clipped": (
        "kernels/step_bwd.py",
        'tl.where(step == 0, float("inf"), clip)',
        "clip",
        "tests/kernels/test_step_bwd.py",
    ),
    "walked tiles skipped": (
        "kernels/recurrence_bwd.py",
        "tiles_b, tl.num_programs(1)):",
        "tiles_b, 2 * tl.num_programs(1)):",
        "tests/kernels/test_recurrence_bwd.py",
    ),
    "forward mode drops tangents": (
        "fusedlstm/functional.py",
        "if transforms.has_tangents(call.tensors):",
        "if False:",
        "tests/cpu/test_transforms.py",
    ),
    "autograd is not seen behind a transform": (
        "fusedlstm/transforms.py",
        " or transformed())",
        ")",
        "tests/cpu/test_transforms.py",
    ),
    "norms: the product of the other direction": (
        "fusedlstm/gradients.py",
        "products.select(-2, d)",
        "products.select(-2, -1 - d)",
        "tests/cpu/test_family.py",
    ),
}


def run(name: str, root: Path) -> str | None:
    """The test that caught the mutant, or None."""
    file, text, replacement, tests = MUTANTS[name]
    path = root / file
    original = path.read_text()
    assert text in original, f"{name}: {text!r} is not in {file}"
    path.write_text(original.replace(text, replacement))
    extra = ["-k", "not test_compiles and not committed"] if "compiled" in tests else []
    environment = {**os.environ, "PYTHONPATH": str(root)} | ({} if extra else {"TRITON_INTERPRET": "1"})
    try:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", tests, *extra],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
    finally:
        path.write_text(original)
    failed = re.findall(r"^FAILED (\S+)", result.stdout, re.M)
    return failed[0] if result.returncode in (1, 2) and failed else None  # 2: pytest-xdist stopped at the first


def main() -> int:
    wanted = sys.argv[1:] or list(MUTANTS)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "fusedlstm"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__", "*.egg-info"))
        # The copy is imported in place of the installed package; kernels/ must then lie inside it.
        (root / "fusedlstm" / "kernels").symlink_to(root / "kernels")
        for name in wanted:
            caught = run(name, root)
            survivors += [] if caught else [name]
            sys.stdout.write(f"{name:40s} {caught or 'SURVIVED'}\n")
            sys.stdout.flush()
    return int(bool(survivors))


if __name__ == "__main__":
    raise SystemExit(main())
