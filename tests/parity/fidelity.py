#!/usr/bin/env python3
"""The fidelity gap, computed by transformers: all experts active against top-k, same weights, same tokens.

    fidelity.py --binary target/release/hardmax                  compares `hardmax fidelity --json` with it, on tests/goldens
    fidelity.py --binary target/release/hardmax --checkpoint DIR another checkpoint, instead
    fidelity.py --write                                          writes tests/goldens/fidelity.json, for `cargo test`

The reference mixes all experts by the full softmax (k = E). Local measures come from its hidden states: in every layer,
transformers' own router and experts are called again on what they were given, with k = 1, 2 or the family's own.
Free-running ones come from two whole forwards. Every number must agree within 1e-4, as a part of itself where it is
above 1. Exit status: 0 all agree, 1 some do not, 2 the comparison itself failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from reference import Reference

TOLERANCE = 1e-4
CASES = ("mixtral_gqa", "olmoe_clip", "qwen2_shared_sparse_step", "qwen3_mlp_only", "mixtral_bf16")
MODES = ("native", "top1", "top2")
ROUTING = {"native": "native", "top1": "top-1", "top2": "top-2"}
WINDOW, TOKENS = 48, 120


class Layers:
    """What every MoE layer of one forward was given and said: x [T, D] and the router's logits, weights, ids."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.blocks = {index: reference.model.model.layers[index].mlp for index in reference.routers}

    def run(self, ids: list[int], mode: str) -> tuple[torch.Tensor, dict[int, dict[str, torch.Tensor]]]:
        seen: dict[int, dict[str, torch.Tensor]] = {}

        def hook(index):
            def keep(_module, inputs, output):
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                seen[index] = {"x": x, "logits": output[0], "weights": output[1], "ids": output[2]}
            return keep

        hooks = [block.gate.register_forward_hook(hook(index)) for index, block in self.blocks.items()]
        try:
            logits = self.reference.forward(ids, mode).logits
        finally:
            for handle in hooks:
                handle.remove()
        return logits, seen

    @torch.no_grad()
    def experts(self, index: int, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [T, k], heaviest first, and the output of the routed experts [T, D] of one layer on other rows."""
        block = self.blocks[index]
        block.gate.top_k = k
        _, weights, ids = block.gate(x)
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return ids.gather(-1, order), block.experts(x, ids, weights).double()

    @torch.no_grad()
    def alone(self, index: int, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The unweighted output of one expert for each row."""
        return self.blocks[index].experts(x, ids[:, None], torch.ones(len(x), 1)).double()


def summary(values: torch.Tensor) -> dict[str, float]:
    ordered = values.double().sort().values
    rank = lambda share: ordered[max(math.ceil(share * len(ordered)), 1) - 1].item()
    return {"mean": ordered.mean().item(), "p50": rank(0.5), "p95": rank(0.95), "p99": rank(0.99), "max": ordered[-1].item()}


def sets(ids: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in ids.tolist()]


def measure(reference: Reference, windows: list[list[int]], mode: str) -> dict:
    """The numbers of one policy in the report of `hardmax fidelity`, by the same names."""
    layers, k = Layers(reference), reference.k_of(mode)
    rows: dict[str, list] = {name: [] for name in ("kl", "js", "top1", "top5", "flipped", "nll_r", "nll_h")}
    by_layer: dict[int, dict[str, list]] = {
        index: {name: [] for name in ("l2", "cos", "norm", "missed", "margin", "overlap", "first", "exact", "d", "r", "dx", "x", "pair", "one")}
        for index in layers.blocks
    }
    for window in windows:
        ref_logits, ref = layers.run(window, "soft")
        srv_logits, srv = layers.run(window, mode)
        p, q = ref_logits.double().log_softmax(-1), srv_logits.double().log_softmax(-1)
        middle = (0.5 * (p.exp() + q.exp())).log()
        rows["kl"].append((p.exp() * (p - q)).sum(-1))
        rows["js"].append(0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1))
        rows["top1"].append((p.argmax(-1) == q.argmax(-1)).double())
        fives = zip(sets(p.topk(5).indices), sets(q.topk(5).indices))
        rows["top5"].append(torch.tensor([len(a & b) / 5 for a, b in fives]))
        following = torch.tensor(window[1:])
        rows["nll_r"].append(-p[:-1].gather(-1, following[:, None])[:, 0])
        rows["nll_h"].append(-q[:-1].gather(-1, following[:, None])[:, 0])
        flipped = torch.zeros(len(window), dtype=torch.bool)
        for index, of in by_layer.items():
            x, logits = ref[index]["x"], ref[index]["logits"].double()
            _, y_ref = layers.experts(index, x, reference.num_experts)
            ids, y = layers.experts(index, x, k)
            order = logits.argsort(dim=-1, descending=True, stable=True)
            of["l2"].append((y_ref - y).norm(dim=-1) / y_ref.norm(dim=-1))
            of["cos"].append(1 - torch.nn.functional.cosine_similarity(y_ref, y, dim=-1, eps=1e-300))
            of["norm"].append(y.norm(dim=-1) / y_ref.norm(dim=-1))
            of["missed"].append(1 - logits.softmax(-1).gather(-1, ids).sum(-1))
            ordered = logits.gather(-1, order)
            of["margin"].append(ordered[:, k - 1] - ordered[:, k])
            of["d"].append((y_ref - y).square().sum())
            of["r"].append(y_ref.square().sum())
            of["dx"].append((x - srv[index]["x"]).double().square().sum())
            of["x"].append(x.double().square().sum())
            one, two = (layers.alone(index, x, order[:, place]) for place in (0, 1))
            of["pair"].append((one - two).norm(dim=-1))
            of["one"].append(one.norm(dim=-1))
            served = srv[index]["logits"].argsort(dim=-1, descending=True, stable=True)[:, :k]
            both = [len(a & b) for a, b in zip(sets(order[:, :k]), sets(served))]
            of["overlap"].append(torch.tensor(both) / k)
            of["exact"].append(torch.tensor([n == k for n in both]))
            of["first"].append(order[:, 0] != served[:, 0])
            flipped |= ~of["exact"][-1]
        rows["flipped"].append(flipped)
    cat = {name: torch.cat(values) for name, values in rows.items()}
    mean = lambda tensor: tensor.double().mean().item()
    perplexity = {"reference": math.exp(mean(cat["nll_r"])), "served": math.exp(mean(cat["nll_h"]))}
    return {
        "output": {
            "kl": summary(cat["kl"]), "js": summary(cat["js"]), "top1_agree": mean(cat["top1"]),
            "top5_overlap": mean(cat["top5"]),
            "perplexity": perplexity | {"gap": math.expm1(mean(cat["nll_h"]) - mean(cat["nll_r"]))},
        },
        "tokens_flipped": mean(cat["flipped"]),
        "layers": [report(index, of) for index, of in sorted(by_layer.items())],
    }


def report(index: int, of: dict[str, list]) -> dict:
    cat = {name: torch.cat([value.reshape(-1) for value in values]) for name, values in of.items()}
    mean = lambda name: cat[name].double().mean().item()
    return {
        "layer": index,
        "l2_rel": summary(cat["l2"]),
        "l2_rel_pooled": math.sqrt(cat["d"].sum() / cat["r"].sum()),
        "cosine_distance": summary(cat["cos"]),
        "norm_ratio": summary(cat["norm"]),
        "missed_mass": summary(cat["missed"]),
        "margin": summary(cat["margin"]),
        "boundary_mass": (cat["margin"] < 1).double().mean().item(),
        "disagreement": (cat["pair"].sum() / cat["one"].sum()).item(),
        "overlap": mean("overlap"),
        "exact": mean("exact"),
        "argmax_disagree": mean("first"),
        "input_drift": math.sqrt(cat["dx"].sum() / cat["x"].sum()),
    }


def text(name: str, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(0, vocabulary, (TOKENS,), generator=generator).tolist()


def ours(binary: Path, folder: Path, ids: list[int]) -> dict[str, dict]:
    """Policies of the report by every name they have."""
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "ids").write_text(" ".join(map(str, ids)))
        command = [
            str(binary.resolve()), "fidelity", "--model", str(folder), "--token-ids", f"{tmp}/ids", "--window", str(WINDOW),
            "--reference", "soft:1", "--routing", ",".join(ROUTING.values()), "--floor-tokens", "0",
            "--advice-tokens", "0", "--json", f"{tmp}/report.json",
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=600)
        found = json.loads((Path(tmp) / "report.json").read_text())
    return {name: policy for policy in found["policies"] for name in [policy["name"], *policy["aliases"]]}


def short(value):
    """The same with ten digits."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def differences(expected, found, path: str = "") -> list[tuple[float, str]]:
    """How far every number is from the expected one, with its place."""
    if isinstance(expected, dict):
        return [d for key, value in expected.items() for d in differences(value, found[key], f"{path}.{key}")]
    if isinstance(expected, list):
        assert len(expected) == len(found), path
        return [d for i, pair in enumerate(zip(expected, found)) for d in differences(*pair, f"{path}[{i}]")]
    distance = abs(expected - found) / max(1.0, abs(expected))
    return [(distance if distance == distance else math.inf, f"{path.lstrip('.')}: {found}, not {expected}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    goldens = Path(__file__).parents[1] / "goldens"
    parser.add_argument("--binary", type=Path, default=Path("target/release/hardmax"))
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--write", action="store_true", help="write tests/goldens/fidelity.json instead")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if not args.write and not args.binary.is_file():
        print(f"fidelity.py: no such program: {args.binary}", file=sys.stderr)
        return 2
    failed, golden = 0, {}
    for folder in args.checkpoint or [goldens / case for case in CASES]:
        reference = Reference(folder)
        ids = text(folder.name, reference.model.config.vocab_size)
        windows = [ids[at : at + WINDOW] for at in range(0, TOKENS, WINDOW)]
        expected = {ROUTING[mode]: measure(reference, windows, mode) for mode in MODES}
        golden[folder.name] = {"window": WINDOW, "tokens": ids, "policies": expected}
        if args.write:
            continue
        found = ours(args.binary, folder, ids)
        for name, policy in expected.items():
            numbers = differences(policy, found[name])
            wrong = [number for number in numbers if number[0] > TOLERANCE]
            failed += bool(wrong)
            print(f"{folder.name:28s} {name:7s} {len(numbers):4d} numbers, largest difference {max(numbers)[0]:.1e}  "
                  f"{'FAILED' if wrong else 'ok'}")
            for _, where in sorted(wrong, reverse=True)[:5]:
                print(f"    {where}")
    if args.write:
        lines = [f"{json.dumps(name)}: {json.dumps(short(case))}" for name, case in golden.items()]
        (goldens / "fidelity.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
