#!/usr/bin/env python3
"""Compares `hardmax forward` with transformers, both run now, on the same checkpoint and the same tokens.

    check.py --binary target/release/hardmax                       every checkpoint in tests/goldens
    check.py --binary target/release/hardmax --random 3            also three new random checkpoints of each case
    check.py --binary target/release/hardmax --checkpoint DIR      another checkpoint, instead

For each of the routings native, top-1, top-2 and soft:

    logits      largest difference, as a part of the range of the logits          < 1e-4
    router      the same for the router logits, worst layer                       < 1e-4
    experts     (token, layer) pairs where the chosen sets differ, not counting ties (router logits within 1e-5;
                a token with a tie and those after it are left out from there on)
    weights     largest difference of an expert's weight                          < 1e-4
    greedy      native only: the next 12 tokens, up to a tie (lead under 1e-4 of the range)

Exit status: 0 all agree, 1 some do not, 2 the comparison itself failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

import cases
import checkpoints
from reference import MODES, Forward, Reference, Routing

TOLERANCE = 1e-4
TIE = 1e-5
CONTINUATION = 12
ROUTING = {"native": "native", "top1": "top-1", "top2": "top-2", "soft": "soft"}


class Broken(Exception):
    """The program under test did not run, or wrote something else than agreed."""


class Program:
    """The binary under test."""

    def __init__(self, binary: Path):
        self.binary = binary

    def forward(self, folder: Path, ids: list[int], mode: str) -> Forward:
        with tempfile.TemporaryDirectory() as tmp:
            output = Path(tmp) / "forward.safetensors"
            command = [
                str(self.binary), "forward", "--model", str(folder), "--input-ids", ",".join(map(str, ids)),
                "--routing", ROUTING[mode], "--output", str(output),
            ]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                raise Broken(f"exit status {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
            with safe_open(output, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        return read(tensors)


def read(tensors: dict[str, torch.Tensor]) -> Forward:
    if "logits" not in tensors:
        raise Broken(f"no tensor `logits` in the output, only {sorted(tensors)}")
    routing = {}
    for name in tensors:
        if name.startswith("router_logits."):
            layer = int(name.removeprefix("router_logits."))
            missing = [n for n in (f"expert_ids.{layer}", f"expert_weights.{layer}") if n not in tensors]
            if missing:
                raise Broken(f"no tensor {' or '.join(missing)} in the output")
            routing[layer] = Routing(
                tensors[name], tensors[f"expert_ids.{layer}"].long(), tensors[f"expert_weights.{layer}"]
            )
    return Forward(tensors["logits"], routing)


@dataclasses.dataclass
class Row:
    """The comparison of one checkpoint under one routing."""

    case: str
    mode: str
    logits: float = 0.0
    router: float = 0.0
    experts: int = 0
    ties: int = 0
    weights: float = 0.0
    greedy: str = ""
    problem: str = ""

    def agrees(self) -> bool:
        numbers = max(self.logits, self.router, self.weights) < TOLERANCE
        return numbers and self.experts == 0 and not self.problem and self.greedy in ("", "same", "tie")

    def line(self) -> str:
        verdict = "ok" if self.agrees() else "FAILED"
        if self.ties:
            verdict += f" (up to the first of {self.ties} ties)"
        return (f"{self.case:34s} {ROUTING[self.mode]:7s} {self.logits:9.1e} {self.router:9.1e} {self.experts:8d} "
                f"{self.weights:9.1e}  {self.greedy:8s} {verdict} {self.problem}")


def compare(row: Row, ours: Forward, theirs: Forward) -> None:
    if ours.logits.shape != theirs.logits.shape or ours.logits.dtype != torch.float32:
        row.problem = f"logits are {ours.logits.dtype} {tuple(ours.logits.shape)}, not {tuple(theirs.logits.shape)}"
        return
    if sorted(ours.routing) != sorted(theirs.routing):
        row.problem = f"routing of layers {sorted(ours.routing)}, not {sorted(theirs.routing)}"
        return
    # Tokens from the first tie on are another function in the layers above it, which says nothing about either side.
    until = len(theirs.logits)
    for layer in sorted(theirs.routing):
        expected, found = theirs.routing[layer], ours.routing[layer]
        if found.ids.shape != expected.ids.shape or found.logits.shape != expected.logits.shape:
            row.problem = (f"layer {layer}: ids {tuple(found.ids.shape)} and logits {tuple(found.logits.shape)}, not "
                           f"{tuple(expected.ids.shape)} and {tuple(expected.logits.shape)}")
            return
        if found.ids.min() < 0 or found.ids.max() >= expected.logits.shape[1]:
            row.problem = f"layer {layer}: expert {found.ids.max().item()} of {expected.logits.shape[1]}"
            return
        found_weights, found_mask = dense(found, expected.logits.shape)
        expected_weights, expected_mask = dense(expected, expected.logits.shape)
        if (found_mask.sum(-1) != expected_mask.sum(-1)).any():
            row.problem = f"layer {layer}: a token has the same expert twice"
            return
        row.router = max(row.router, part_of_range(found.logits[:until], expected.logits[:until]))
        differs = (found_mask != expected_mask)[:until]
        same = ~differs.any(-1)
        # A tie: all experts on which the two disagree have the same router logit.
        for token in differs.any(-1).nonzero().flatten().tolist():
            logits = expected.logits[token][differs[token]]
            if logits.max() - logits.min() < TIE:
                row.ties += 1
                until = min(until, token)
            else:
                row.experts += 1
        row.weights = max(row.weights, largest((found_weights - expected_weights)[: len(same)][same]))
    row.logits = part_of_range(ours.logits[:until], theirs.logits[:until])


def largest(difference: torch.Tensor) -> float:
    """The largest magnitude; a NaN is larger than anything, nothing is 0."""
    if difference.numel() == 0:
        return 0.0
    value = difference.abs().max().item()
    return value if value == value else float("inf")


def part_of_range(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if theirs.numel() == 0:
        return 0.0
    return largest(ours.double() - theirs.double()) / max((theirs.max() - theirs.min()).item(), 1e-30)


def dense(routing: Routing, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and choice of one layer as [T, E], whatever the order of the experts of a token."""
    weights = torch.zeros(shape).scatter(1, routing.ids, routing.weights.float())
    mask = torch.zeros(shape, dtype=torch.bool).scatter(1, routing.ids, True)
    return weights, mask


def greedy(program: Program, folder: Path, reference: Reference, ids: list[int]) -> str:
    """Both continue their own text: "same", "tie" (same up to a tie) or where they part."""
    ids = list(ids)
    for step in range(CONTINUATION):
        expected = reference.forward(ids, "native").logits[-1]
        found = program.forward(folder, ids, "native").logits[-1]
        if found.argmax() != expected.argmax():
            lead = expected.max() - expected[found.argmax()]
            return "tie" if lead < TOLERANCE * (expected.max() - expected.min()) else f"from {step}"
        ids.append(int(expected.argmax()))
    return "same"


def check(program: Program, folder: Path, name: str, ids: list[int] | None, tokens: int, modes: list[str]) -> list[Row]:
    reference = Reference(folder)
    if ids is None:
        generator = torch.Generator().manual_seed(len(name) + tokens)
        ids = torch.randint(0, reference.model.config.vocab_size, (tokens,), generator=generator).tolist()
    rows = []
    for mode in modes:
        if reference.k_of(mode) > reference.num_experts:
            continue
        row = Row(name, mode)
        try:
            compare(row, program.forward(folder, ids, mode), reference.forward(ids, mode))
            if mode == "native" and not row.problem:
                row.greedy = greedy(program, folder, reference, ids)
                if row.ties and row.greedy != "same":
                    row.greedy = "tie"
        except (Broken, subprocess.TimeoutExpired) as error:
            row.problem = str(error)
        print(row.line(), flush=True)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=Path("target/release/hardmax"))
    parser.add_argument("--cases", type=Path, default=Path(__file__).parents[1] / "goldens", metavar="DIR",
                        help="folder of checkpoint folders (default: tests/goldens)")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="DIR",
                        help="check this one instead; may be given more than once")
    parser.add_argument("--random", type=int, default=0, metavar="N",
                        help="also check N new random checkpoints of each case in cases.py")
    parser.add_argument("--seed", type=int, default=1000, help="first seed of --random")
    parser.add_argument("--input-ids", type=lambda text: [int(i) for i in text.split(",")], default=None,
                        help="default: random tokens")
    parser.add_argument("--tokens", type=int, default=32, help="how many random tokens")
    parser.add_argument("--mode", choices=MODES, action="append", default=[], help="default: all")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if not args.binary.is_file():
        print(f"check.py: no such program: {args.binary}", file=sys.stderr)
        return 2
    program, modes = Program(args.binary), args.mode or list(MODES)
    folders = args.checkpoint or sorted(path.parent for path in args.cases.glob("*/config.json"))
    if not folders:
        print(f"check.py: no checkpoint in {args.cases}", file=sys.stderr)
        return 2

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'checkpoint':34s} {'routing':7s} {'logits':>9s} {'router':>9s} {'experts':>8s} {'weights':>9s}  greedy")
    rows = []
    for folder in folders:
        rows += check(program, folder, folder.resolve().name, args.input_ids, args.tokens, modes)
    for case in cases.CASES if args.random else []:
        for seed in range(args.seed, args.seed + args.random):
            with tempfile.TemporaryDirectory() as tmp:
                folder = Path(tmp) / "model"
                checkpoints.write(case, seed, folder)
                rows += check(program, folder, f"{case.name}/{seed}", args.input_ids, args.tokens, modes)
    failed = [row for row in rows if not row.agrees()]
    worst = max((row.logits for row in rows if not row.problem), default=0.0)
    print(f"{len(rows) - len(failed)} of {len(rows)} agree; largest difference of a logit {worst:.1e} of the range")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
