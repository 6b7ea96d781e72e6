#!/usr/bin/env python3
"""Compares what `hardmax forward` and `hardmax fidelity` wrote on the CPU in f32 and on the GPU in bf16. Plain Python.

    compare.py FOLDER        with cpu.safetensors, cuda.safetensors, cpu.json and cuda.json
"""

import array
import json
import math
import sys
from pathlib import Path

# Of logits and router logits, in the Euclidean norm; of perplexities, in parts. bf16 keeps 8 bits, and a few layers add up.
NORM_TOLERANCE, PERPLEXITY_TOLERANCE = 0.03, 0.01

# Positions whose likeliest token is the same on both: near ties may go either way.
LEAST_AGREEMENT = 0.9


def tensors(path):
    """Name, shape and values of each f32 tensor of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and facts["dtype"] == "F32":
            begin, end = facts["data_offsets"]
            yield name, (facts["shape"], array.array("f", data[8 + length + begin : 8 + length + end]))


def norm(values):
    return math.sqrt(sum(value * value for value in values))


def likeliest(shape, values):
    width = shape[1]
    rows = [values[at : at + width] for at in range(0, len(values), width)]
    return [max(range(width), key=row.__getitem__) for row in rows]


def forward(folder):
    """A line and a verdict for each tensor that a forward wrote, but for weights of experts: those go with the ids."""
    cpu, cuda = (dict(tensors(folder / f"{device}.safetensors")) for device in ("cpu", "cuda"))
    if cpu.keys() != cuda.keys():
        yield f"tensors differ: {sorted(cpu.keys() ^ cuda.keys())}", False
        return
    for name, (shape, expected) in cpu.items():
        if not name.startswith(("logits", "router_logits")):
            continue
        found_shape, found = cuda[name]
        if found_shape != shape:
            yield f"{name}: {found_shape} on the GPU, {shape} on the CPU", False
            continue
        error = norm([a - b for a, b in zip(found, expected)]) / max(norm(expected), 1e-30)
        yield f"{name}: apart by {error:.1e} of the norm (at most {NORM_TOLERANCE})", error <= NORM_TOLERANCE
        if name == "logits":
            pairs = list(zip(likeliest(shape, found), likeliest(shape, expected)))
            same = sum(a == b for a, b in pairs) / len(pairs)
            yield f"likeliest tokens: {same:.0%} are the same (at least {LEAST_AGREEMENT:.0%})", same >= LEAST_AGREEMENT


def fidelity(folder):
    """The same for the perplexity of each routing."""
    cpu, cuda = (json.loads((folder / f"{device}.json").read_text())["policies"] for device in ("cpu", "cuda"))
    found = {policy["name"]: policy for policy in cuda}
    for policy in cpu:
        name = policy["name"]
        if name not in found:
            yield f"{name}: not measured on the GPU", False
            continue
        a, b = (of["output"]["perplexity"]["served"] for of in (policy, found[name]))
        part = abs(b / a - 1)
        yield f"{name}: perplexity {a:.4g} on the CPU, {b:.4g} on the GPU, {part:.2%} apart (at most {PERPLEXITY_TOLERANCE:.0%})", part <= PERPLEXITY_TOLERANCE


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    rows = [*forward(folder), *fidelity(folder)]
    for line, good in rows:
        print(line if good else f"{line}: TOO FAR")
    wrong = [line for line, good in rows if not good]
    print(f"= {len(rows)} comparisons, {len(wrong)} too far" + (f": {wrong[0]}" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
