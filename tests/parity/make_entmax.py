#!/usr/bin/env python3
"""Writes tests/goldens/entmax.json: sparsemax and entmax of some rows, and their gradients, as the `entmax` package has them.

    make_entmax.py [--out FILE]

A list of cases: `alpha`, logits `z`, their weights `p`, a vector `v` and its product `vjp` with the Jacobian of p. All f64.
alpha 2 and 1.5 are the package's exact algorithms, other values its bisection. The rows hold random logits of several
widths, ties, a leader by just less and by more than makes the weights one-hot, and logits far from 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import entmax
import torch

ROOT = Path(__file__).resolve().parents[2]
ALPHAS = [1.1, 1.25, 1.5, 1.75, 2.0]
HALVINGS = 100


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = [
        scale * torch.randn(width, generator=generator, dtype=torch.float64)
        for width, scale in [(1, 1.0), (2, 0.5), (4, 1.0), (8, 0.3), (8, 3.0), (16, 1.0)]
    ]
    special = [[0.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0], [0.9, 0.0, 0.0, -0.5], [12.0, 0.0, 1.0, -3.0], [1e3, 1e3 + 0.25, 998.5]]
    return random + [torch.tensor(row, dtype=torch.float64) for row in special]


def weights(z: torch.Tensor, alpha: float) -> torch.Tensor:
    if alpha == 2.0:
        return entmax.sparsemax(z, dim=-1)
    if alpha == 1.5:
        return entmax.entmax15(z, dim=-1)
    return entmax.entmax_bisect(z, alpha, dim=-1, n_iter=HALVINGS)


def cases() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for row in rows():
        v = torch.randn(row.shape, generator=generator, dtype=torch.float64)
        for alpha in ALPHAS:
            z = row.clone().requires_grad_()
            p = weights(z, alpha)
            (p * v).sum().backward()
            found.append({"alpha": alpha, "z": row.tolist(), "p": p.tolist(), "v": v.tolist(), "vjp": z.grad.tolist()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/goldens/entmax.json")
    out = parser.parse_args().out
    lines = ",\n".join(json.dumps(case) for case in cases())
    out.write_text(f"[\n{lines}\n]\n")
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
