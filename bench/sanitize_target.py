"""A tiny forward and backward for memory and race checkers: `compute-sanitizer python -m bench.sanitize_target`."""

import argparse

import torch

import fusedlstm

# One group and several, below and above the smallest tiles, and odd sizes. They are tiny, because a checker makes a
# kernel a hundred times slower.
SIZES = ((3, 2, 5, 7), (4, 17, 16, 33), (3, 33, 24, 136))  # T, B, I, H


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--tiny", action="store_true", help="the first size alone: a rehearsal")
    options = parser.parse_args()
    dtypes = (torch.float32,) if options.device == "cpu" else (torch.float32, torch.bfloat16)
    for T, B, I, H in SIZES[:1] if options.tiny else SIZES:
        for dtype in dtypes:
            torch.manual_seed(0)
            lstm = fusedlstm.LSTM(
                I, H, bidirectional=H == 7, backend=options.backend, device=options.device, dtype=dtype
            )
            x = torch.randn(T, B, I, device=options.device, dtype=dtype, requires_grad=True)
            output, (h_n, c_n) = lstm(x)
            (output.sum() + h_n.sum() + c_n.sum()).backward()
            grads = [x.grad, *[p.grad for p in lstm.parameters()]]
            if not all(bool(tensor.isfinite().all()) for tensor in (output, *grads)):
                raise SystemExit(f"not finite: T{T}-B{B}-I{I}-H{H}-{dtype}")
            print(f"done T{T}-B{B}-I{I}-H{H}-{str(dtype).removeprefix('torch.')}", flush=True)


if __name__ == "__main__":
    main()
