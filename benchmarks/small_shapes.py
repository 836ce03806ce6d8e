"""One forward and backward of every CUDA kernel on small maps, with and without a tail, for compute-sanitizer."""

import torch

from gspn_dit.ops import propagate

SHAPES = [  # B, H, W, C, G, chunk: on chip in lines of 16 and of 32, tiles, and line by line
    (2, 16, 16, 64, 2, None),
    (1, 12, 12, 36, 3, 2),
    (1, 24, 24, 32, 2, 4),
    (1, 16, 16, 32, 32, 2),
    (1, 40, 40, 32, 2, None),
    (1, 36, 36, 16, 16, 3),
    (1, 33, 33, 15, 5, None),
    (1, 2, 520, 16, 1, None),
]


def main() -> None:
    """Run them all, in float32 and bfloat16."""
    for b, h, w, c, g, chunk in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = (b, h, w, c), (b, h, w, g, 16), (b, h, w, g, 4)
            x, head, u = (torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes)
            decay, scale = (torch.rand(4, c, device="cuda", requires_grad=True) for _ in range(2))
            gates, input_gate = head.split((12, 4), dim=-1)  # as the models have them where G < C
            gates, input_gate = gates.unflatten(-1, (4, 3)).permute(0, 1, 2, 4, 5, 3), input_gate.mT
            output_gate = u.mT
            if g == c:
                gates, input_gate, output_gate = (t.contiguous() for t in (gates, input_gate, output_gate))
            gated = x, gates, input_gate, output_gate
            for tail in ({}, {"direct": torch.rand(c, device="cuda", requires_grad=True)}):
                y = propagate(*gated, decay=decay, scale=scale, **tail, chunk=chunk, backend="native-cuda")
                operands = x, head, u, decay, scale, *tail.values()
                grads = torch.autograd.grad(y, operands, torch.randn_like(y), retain_graph=True)
                torch.cuda.synchronize()
                assert all(t.isfinite().all() for t in (y, *grads))
            print(b, h, w, c, g, chunk, dtype, "done", flush=True)


if __name__ == "__main__":
    main()
