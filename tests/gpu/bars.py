#!/usr/bin/env python3
"""Holds the figures that run.sh measured against the bars that README.md names. Plain Python.

    bars.py FOLDER        with bench.SHAPE.decode.json, bench.SHAPE.prefill.json, peer.SHAPE.json and overhead.json, as far as they are there

Prints a table in Markdown. A bar that is missed is a finding, no error: the exit status is 0 whatever the figures are.
"""

import json
import sys
from pathlib import Path

from shapes import SHAPES

DECODE_OF_COPY, PREFILL_OF_GEMM = 0.70, 0.50
OVER_TRANSFORMERS, TOP1_OVER_TOP2, SHADOW = 1.5, 1.6, 0.02
COMPARED = ("olmoe-1b-7b", "qwen3-30b-a3b")


class Results:
    """What lies in a folder; what is absent is None."""

    def __init__(self, folder):
        self.folder = folder

    def read(self, name):
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def steps(self, shape, work):
        return (self.read(f"bench.{shape}.{work}.json") or {}).get("steps", [])

    def step(self, shape, work, batch, routing="native"):
        rows = self.steps(shape, work)
        return next((row for row in rows if row["batch"] == batch and row["routing"] == routing), None)

    def layers(self, shape):
        """Of what bench ran: its name says where the shape was cut."""
        model = ((self.read(f"bench.{shape}.decode.json") or self.read(f"bench.{shape}.prefill.json") or {}).get("model") or {}).get("name", "")
        cut = [part.split("=")[1] for part in model.split(",") if part.startswith("layers=")]
        return int(cut[0]) if cut else SHAPES[shape].layers

    def peer(self, shape, work, batch, triton):
        """The fastest row of transformers with experts of its own, or with the Triton kernel's; and its layers."""
        report = next(iter((self.read(f"peer.{shape}.json") or {}).get("reports", [])), None)
        if not report:
            return None, None
        rows = [row for row in report["steps"] if (row["work"], row["batch"], row["engine"] == "triton") == (work, batch, triton)]
        return max(rows, key=lambda row: row["tokens_per_second"], default=None), report["model"]["layers"]


def of_limits(results):
    for shape, spec in SHAPES.items():
        for batch in (1, 64):
            share = of_copy(results.step(shape, "decode", batch))
            yield f"{shape}, decode at batch {batch}, of the copy bandwidth", DECODE_OF_COPY, share, percent
        step, share = results.step(shape, "prefill", 1), None
        seconds = expert_seconds(step)
        if seconds and step["limit"]:
            flops = 2 * results.layers(shape) * spec.top_k * spec.expert_weights
            share = flops / seconds / step["limit"]["flops"]
        yield f"{shape}, prefill, experts, of the dense bf16 rate", PREFILL_OF_GEMM, share, percent
        one, two = (expert_seconds(results.step(shape, "prefill", 1, routing)) for routing in ("top-1", "top-2"))
        yield f"{shape}, prefill, experts, top-1 over top-2", TOP1_OVER_TOP2, one and two and two / one, times


def of_copy(step):
    """Bytes that a step has to move over its time, as a share of the copy bandwidth that was read around it."""
    copies = sorted(((step or {}).get("readings") or {}).get("copy_bandwidth") or [])
    if not copies:
        return None
    return step["bytes_per_token"] * step["tokens_per_second"] / copies[len(copies) // 2]


def expert_seconds(step):
    """Seconds of the kernels of routed experts, per token: of the run that tells kinds of kernels apart."""
    milliseconds = [kind["milliseconds"] for kind in (step or {}).get("classes", []) if kind["class"] == "experts"]
    if not milliseconds or not step["flops_per_step"]:
        return None
    tokens = step["flops_per_step"] / step["flops_per_token"]
    return milliseconds[0] / 1000 / tokens


def of_peers(results):
    for shape in SHAPES:
        for work, batch in (("decode", 1), ("decode", 16), ("decode", 64), ("prefill", 1)):
            step = results.step(shape, work, batch)
            for triton, name in ((False, "transformers"), (True, "transformers with the Triton kernel")):
                row, layers = results.peer(shape, work, batch, triton)
                ratio = step and row and layers == results.layers(shape) and step["tokens_per_second"] / row["tokens_per_second"]
                bar = OVER_TRANSFORMERS if shape in COMPARED and not triton else None
                if bar or ratio:
                    yield f"{shape}, {work} at batch {batch}, over {name}", bar, ratio, times


def of_watching(results):
    rows = ((results.read("overhead.json") or {}).get("overhead") or {}).get("rows", [])
    share = next((row["time"]["share"] for row in rows if row["arm"].startswith("shadow")), None)
    yield "shadow samples at 1 %, of the time (less is better)", SHADOW, share, percent


def percent(value):
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.1f} %"


def times(value):
    return f"{value:.2f} x"


def verdict(bar, value, less):
    if bar is None:
        return "-"
    if value is None or value is False:
        return "not measured"
    return "met" if (value < bar if less else value >= bar) else "missed"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    results = Results(Path(sys.argv[1]))
    rows = [*of_limits(results), *of_peers(results), *of_watching(results)]
    print("| what | bar | found | |\n|---|---:|---:|---|")
    for what, bar, value, form in rows:
        shown = form(value) if isinstance(value, float) else "-"
        print(f"| {what} | {form(bar) if bar else '-'} | {shown} | {verdict(bar, value, what.startswith('shadow'))} |")


if __name__ == "__main__":
    main()
