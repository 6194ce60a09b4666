"""A plan in words."""

from fusedlstm import cells, tables
from fusedlstm.plan import cost as costs
from fusedlstm.plan.choice import CLEARLY, beside_cudnn, candidates
from fusedlstm.plan.devices import DEVICES, capped, sms


def explain(
    hidden: int,
    batch: int = 64,
    steps: int = 100,
    dtype: str = "bf16",
    arch: str = "sm_90",
    directions: int = 1,
    heads: int = 1,
    runners_up: int = 4,
    cell: str = "lstm",
) -> str:
    """Both plans of a layer in words, as `python -m fusedlstm plan` prints them."""
    limits = capped(DEVICES[arch], sms())
    text = [f"{cell} layer: T={steps} B={batch} H={hidden} {dtype}, {directions} direction(s), {arch} ({limits.name})"]
    if heads > 1:
        text[0] += f", {heads} heads"
    if limits.num_sms < DEVICES[arch].num_sms:
        text[0] += f", {limits.num_sms} of {DEVICES[arch].num_sms} multiprocessors (FUSEDLSTM_SMS)"
    for pass_, title in (("fwd", "forward"), ("bwd", "backward")):
        found = candidates(cell, steps, batch, hidden, dtype, directions, limits, pass_, heads=heads)
        p, c = found[0], costs.cost(found[0], steps, batch, limits)
        bound = costs.bound(cell, steps, batch, hidden, dtype, directions, limits, pass_, heads=heads)
        text += [
            f"\n{title}: {p.schedule} - {p.why}",
            f"  tile           {p.block_b} batch rows x {p.block_h} hidden units, reduction in chunks of {p.block_k}"
            + (", transposed dot" if p.transposed else ""),
            f"  grid           {p.group} programs a group x {p.grid[1]} groups x {p.grid[2]} direction(s), "
            f"{p.num_warps} warps each; {p.walked} batch tile(s) a group, one after another",
            f"  shared memory  at most {p.smem_bytes / 1024:.0f} of {limits.smem_bytes >> 10} KiB; "
            f"about {p.regs} registers a thread",
            f"  synchronised   {p.barriers_per_step} exchange(s) a step, protocol {p.protocol}",
            f"  predicted      {c.step:.2f} us a step, set by {c.limit}; {c.total / 1000:.3f} ms in all "
            "(an ordering of candidates, not a measurement)",
            f"                 wait {c.wait:.2f}, operand {c.operand:.2f}, product {c.product:.2f}, issue "
            f"{c.issue:.2f}, x {c.walked} walked; memory {c.traffic:.2f}; launch and weights {c.launch:.1f}",
            f"  bound          {bound.step:.2f} us a step, set by {bound.limit}: arithmetic {bound.arithmetic:.2f}, "
            f"memory {bound.memory:.2f}, latency {bound.latency:.2f}",
        ]
        rows = [
            (
                f"{k}.",
                q.schedule,
                f"{q.block_b}x{q.block_h}x{q.block_k}{'T' if q.transposed else ''}",
                q.num_warps,
                "x".join(map(str, q.grid)),
                q.walked,
                f"{q.smem_bytes / 1024:.0f}",
                f"{q.step_us:.2f}",
            )
            for k, q in enumerate(found[: 1 + runners_up], 1)
        ]
        text.append(tables.text(["", "schedule", "tiles", "warps", "grid", "walked", "smem KiB", "us a step"], rows))
    if heads == 1 and cells.CELLS[cell].aten:
        text.append("")
        for training, title in ((True, "training"), (False, "inference")):
            ours, cudnn = beside_cudnn(cell, batch, hidden, dtype, directions, limits, training=training)
            engine = "torch" if ours > CLEARLY * cudnn else "triton"
            text.append(
                f"auto, {title}: {engine} - predicted {ours:.2f} us a step, cuDNN {cudnn:.2f} (a product and a pointwise "
                f"kernel a step); torch is taken from {CLEARLY} times its time on, or where `fusedlstm.tune` measured it faster"
            )
    return "\n".join(text)
