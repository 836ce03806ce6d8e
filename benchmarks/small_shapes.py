"""One forward and backward of every CUDA kernel on small maps, for compute-sanitizer (see gpu.sh)."""

import torch

from gspn_dit.ops import propagate

SHAPES = [  # B, side, C, G, chunk: on chip in lines of 16 and of 32, tiles, and line by line
    (2, 16, 64, 2, None),
    (1, 12, 36, 3, 2),
    (1, 24, 32, 2, 4),
    (1, 16, 32, 32, 2),
    (1, 40, 32, 2, None),
    (1, 36, 16, 16, 3),
    (1, 33, 15, 5, None),
]


def main() -> None:
    """Run them all, in float32 and bfloat16."""
    for b, side, c, g, chunk in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = (b, side, side, c), (b, side, side, 4, 3, g), (b, side, side, 4, g), (b, side, side, 4, g)
            tensors = [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]
            tensors += [torch.rand(4, c, device="cuda", requires_grad=True) for _ in range(2)]
            y = propagate(*tensors[:4], decay=tensors[4], scale=tensors[5], chunk=chunk, backend="cuda")
            grads = torch.autograd.grad(y, tensors, torch.randn_like(y))
            torch.cuda.synchronize()
            assert all(t.isfinite().all() for t in (y, *grads))
            print(b, side, c, g, chunk, dtype, "done", flush=True)


if __name__ == "__main__":
    main()
