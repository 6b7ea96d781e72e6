#!/usr/bin/env python3
"""Writes tests/goldens/: small random checkpoints of every family, and what transformers computes for them.

    make_goldens.py [--out DIR] [CASE ...]

Each case is a folder that `hardmax` can load, and golden.safetensors in it:

    input_ids [T]                                   the prompt
    native.greedy [12]                              its greedy continuation, end-of-sequence ignored
    MODE.logits [T, V]                              MODE: native, top1, top2, soft (all experts, full softmax)
    MODE.router_logits.N [T, E]                     N: decoder layer, from 0
    MODE.expert_ids.N, MODE.expert_weights.N [T, k] heaviest first; soft: k = E, by expert id

Floats are f32, integers i64. A golden is of use only where no choice in it hangs on rounding, so the seed of a case is
the first under which no expert is chosen and no token continued by a hair. Same machine, same versions: same bytes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import cases
import checkpoints
from reference import MODES, Reference, closest_choice

PROMPT = 24
CONTINUATION = 12
# A router logit is of order 1 and f32 rounding moves it by about 1e-6, so these leave a factor of a thousand.
CLOSEST_CHOICE = 2e-3
CLOSEST_TOKEN = 5e-3
# Removing a feature must move some logit by this part of their range: 100 times the tolerance of the tests.
LEAST_EFFECT = 1e-2


def prompt(name: str, vocabulary: int) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (PROMPT,), generator=generator).tolist()


def make(case: checkpoints.Case, folder: Path) -> str:
    ids = prompt(case.name, case.config["vocab_size"])
    for seed in range(200):
        checkpoints.write(case, seed, folder)
        reference = Reference(folder)
        forwards = {mode: reference.forward(ids, mode) for mode in MODES}
        choice = min(closest_choice(forward) for forward in forwards.values())
        if choice < CLOSEST_CHOICE:
            continue
        continuation, token = reference.greedy(ids, CONTINUATION)
        if token >= CLOSEST_TOKEN:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed without a close call")

    logits = forwards["native"].logits
    span = (logits.max() - logits.min()).item()
    for key, value in case.differs:
        effect = (changed_logits(folder, key, value, ids) - logits).abs().max().item() / span
        if effect < LEAST_EFFECT:
            raise RuntimeError(f"{case.name}: {key} = {value} changes the logits by {effect:.1e} of their range only")

    tensors = {"input_ids": torch.tensor(ids), "native.greedy": torch.tensor(continuation)}
    for mode, forward in forwards.items():
        tensors[f"{mode}.logits"] = forward.logits
        for layer, routing in forward.routing.items():
            tensors[f"{mode}.router_logits.{layer}"] = routing.logits
            tensors[f"{mode}.expert_ids.{layer}"] = routing.ids
            tensors[f"{mode}.expert_weights.{layer}"] = routing.weights
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "golden.safetensors")
    (folder / "golden.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (f"{case.name:28s} seed {seed:3d}  {size / 1024:6.1f} KiB  logits {logits.min():6.2f} to {logits.max():5.2f}"
            f"  closest choice {choice:.1e}  closest token {token:.1e}")


def changed_logits(folder: Path, key: str, value: object, ids: list[int]) -> torch.Tensor:
    """Native logits of the same weights under a config that differs in one value."""
    with tempfile.TemporaryDirectory() as tmp:
        other = Path(tmp) / "model"
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text())
        inner = config
        *path, last = key.split(".")
        for part in path:
            inner = inner[part]
        inner[last] = copy.deepcopy(value)
        (other / "config.json").write_text(json.dumps(config))
        return Reference(other).forward(ids, "native").logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "goldens")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    known = {case.name: case for case in cases.CASES}
    if unknown := sorted(set(args.cases) - set(known)):
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    for name in args.cases or known:
        print(make(known[name], args.out / name), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
