#!/usr/bin/env python3
"""Measures what hardmax is compared with on a GPU: Hugging Face transformers and a fused Triton kernel, on the shapes of `hardmax bench`.

    peer.py [--layers 4] [--json FILE]         on a GPU; needs torch, transformers and triton
    peer.py --device cpu --tiny                a rehearsal with toy shapes, the kernel in Triton's interpreter

Weights are random bf16, made on the device. Decoding continues sequences with random keys and values in a static cache; prefill reads one
prompt. The experts run as transformers' grouped product (grouped_mm), as copies of weights for each row (batched_mm, what its generate()
takes for decoding), and as the Triton kernel of fused_moe.py inside the same model. Shares are of the copy bandwidth and of the dense bf16
product of this machine, read before and after every row. What was not run is said so; nothing is scaled.

Exit status: 0; 1 if the kernel is wrong or nothing could be measured; 2 for bad arguments; 77 where something that is needed is missing.
"""

import argparse
import datetime
import gc
import importlib
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

from shapes import BF16, SHAPES, toy

FORMAT = 1
EXPERTS = ("grouped_mm", "batched_mm", "triton")
MODES = ("eager", "graph", "compile")
SKIPPED = 77
NEEDED = {"torch": "2.9", "transformers": "5.17", "triton": "3.5"}

# Beside weights and caches: activations of a long prompt, workspaces, and the copies of batched_mm.
SPARE_BYTES = 8 << 30


def numbers(text):
    values = [int(part) for part in text.split(",")]
    if any(value < 1 for value in values):
        raise ValueError
    return values


numbers.__name__ = "list of positive numbers"


def number(text):
    return numbers(text)[0] if "," not in text else int(text)


number.__name__ = "positive number"


def words(known, what):
    def parse(text):
        chosen = text.split(",")
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{what} {word!r} is none of {', '.join(known)}")
        return chosen

    return parse


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--shapes", type=words(SHAPES, "shape"), default=list(SHAPES), metavar="NAME,..", help=", ".join(SHAPES) + " (all)")
    add("--layers", type=number, metavar="N", help="cut the models to so many layers (default: all of them)")
    add("--batch", type=numbers, metavar="N,..", help="sequences that decode at once (1,16,64)")
    add("--context", type=number, metavar="N", help="tokens before the first that is decoded (512)")
    add("--generate", type=number, metavar="N", help="steps of a decode run (32)")
    add("--prompt-tokens", type=number, metavar="N", help="length of the prompt of a prefill (8192)")
    add("--rows", type=numbers, metavar="N,..", help="tokens for the experts of one layer (1,16,64,8192)")
    add("--experts", type=words(EXPERTS, "implementation"), default=list(EXPERTS), metavar="NAME,..", help=f"{', '.join(EXPERTS)} (all)")
    add("--modes", type=words(MODES, "mode"), metavar="NAME,..",
        help="how decode steps run: eager, graph (CUDA graph), compile (torch.compile in a graph; takes minutes) (eager,graph)")  # fmt: skip
    add("--repeats", type=number, metavar="N", help="runs of each row, of which the median counts (5)")
    add("--limits-mib", type=number, metavar="N", help="size of the buffer that is copied (2048)")
    add("--gemm-size", type=number, metavar="N", help="rows and columns of the dense product (8192)")
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="toy shapes, for a rehearsal")
    add("--json", type=Path, metavar="FILE", help="also write everything that was measured to this file")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for a rehearsal: give --tiny too")
    if args.device == "cpu" and "graph" in (args.modes or []):
        parser.error("--modes graph: there are no CUDA graphs on the CPU")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    large = {"batch": [1, 16, 64], "context": 512, "generate": 32, "prompt_tokens": 8192, "rows": [1, 16, 64, 8192], "repeats": 5,
             "limits_mib": 2048, "gemm_size": 8192, "modes": ["eager", "graph"]}  # fmt: skip
    small = {"batch": [1, 3], "context": 5, "generate": 2, "prompt_tokens": 7, "rows": [1, 9], "repeats": 2, "limits_mib": 16,
             "gemm_size": 256, "modes": ["eager"] if args.device == "cpu" else ["eager", "graph"]}  # fmt: skip
    for name, value in (small if args.tiny else large).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def missing(device):
    """What is not there, in words; nothing if all is."""
    for module, version in NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            return f"{sys.executable} has no usable {module} ({error}); needed: " + ", ".join(f"{m} >= {v}" for m, v in NEEDED.items())
        parts = lambda text: [int("".join(filter(str.isdigit, part)) or 0) for part in text.split("+")[0].split(".")[:2]]
        if parts(found.__version__) < parts(version):
            return f"{module} is {found.__version__} in {sys.executable}; needed: {version} or newer"
    torch = importlib.import_module("torch")
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; --device cpu --tiny rehearses without one"
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {torch.cuda.get_device_capability()}; bf16 needs 8.0"
    return None


def machine(torch, device):
    facts = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "device": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
                  "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}  # fmt: skip
    return facts


def fits(measure, args, shape):
    """Fails where weights and caches are larger than the memory that is free, with the number of layers that would do."""
    if args.device != "cuda":
        return
    gc.collect()  # Models have cycles: the one before may still be there.
    free = measure.free_memory() - SPARE_BYTES
    tokens = max(max(args.batch) * (args.context + args.generate + 1), args.prompt_tokens)
    need = lambda shape: BF16 * shape.parameters()[0] + shape.cache_bytes(tokens)
    if need(shape) > free:
        most = next((layers for layers in range(shape.layers, 0, -1) if need(replace(shape, layers=layers)) <= free), 0)
        advice = f"--layers {most} would fit" if most else "not even one layer fits"
        raise measure.LeftOut(f"weights and caches of {need(shape) / 1e9:.0f} GB, {free / 1e9:.0f} GB to be had; {advice}")


class Session:
    """One run of the program: what was found so far, and where it is written."""

    def __init__(self, measure, args):
        self.measure, self.args = measure, args
        self.device = measure.torch.device(args.device)
        measure.torch.manual_seed(args.seed)
        versions = {module: importlib.import_module(module).__version__ for module in NEEDED}
        self.report = {
            "format": FORMAT, "program": "tests/gpu/peer.py", "versions": versions | {"python": platform.python_version()},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "tiny": args.tiny,
            "machine": machine(measure.torch, self.device), "checks": [], "reports": [], "left_out": [],
        }  # fmt: skip
        self.tuned = measure.Tuned(measure.Clock(self.device))
        self.limits = measure.Limits(self.device, args.limits_mib << 20, args.gemm_size)

    def save(self):
        if self.args.json:
            self.args.json.write_text(json.dumps(self.report, indent=2) + "\n")

    def attempt(self, what, work):
        """What `work` returns; None, and a line in the report, where it cannot be."""
        torch = self.measure.torch
        try:
            with torch.inference_mode():
                return work()
        except torch.cuda.OutOfMemoryError as error:
            why = str(error).split(". ")[0]
        except self.measure.LeftOut as error:
            why = str(error)
        except Exception as error:  # What a library does not support must not end the others.
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        self.report["left_out"].append({"what": what, "why": why})
        print(f"left out: {what}: {why}", file=sys.stderr, flush=True)
        return None

    def bracketed(self, work):
        """The result of `work`, and the readings of the limits around it."""
        before = self.limits.read()
        result = work()
        after = self.limits.read()
        return result, {name: before[name] + after[name] for name in before}

    def check(self):
        rows = self.attempt("checks of the Triton kernel", lambda: self.measure.check_kernel(self.device)) or []
        self.report["checks"] = rows
        wrong = [row for row in rows if not row["passed"]]
        worst = max((row["norm_error"] for row in rows), default=float("nan"))
        print(f"Triton kernel against f32: {len(rows)} checks, {len(wrong)} wrong, largest error {worst:.1e} of the norm", flush=True)
        for row in wrong:
            print(f"    wrong: {row['case']}, {row['tiles']}: {row['norm_error']:.1e} of the norm, {row['element_error']:.1e} in an element")
        return bool(rows) and not wrong

    def shape(self, shape):
        """Everything about one shape."""
        args, measure = self.args, self.measure
        if args.tiny:
            shape = toy(shape)
        shape = replace(shape, layers=min(shape.layers, args.layers or shape.layers))
        context = max(args.context + args.generate + 1, args.prompt_tokens)
        build = lambda: (fits(measure, args, shape), measure.Model(shape, context, self.device, args.modes, self.tuned))[1]
        model = self.attempt(f"{shape.name}, {shape.layers} layers", build)
        if model is None:
            return
        parameters, active = shape.parameters()
        report = {
            "model": {"name": shape.name, "family": shape.family, "dtype": "bf16", "layers": shape.layers, "parameters": parameters,
                      "active_parameters": active, "element_bytes": {"weights": BF16, "cache": BF16}},
            "limits": None, "steps": [], "experts": [],
        }  # fmt: skip
        self.report["reports"].append(report)
        for experts in args.experts:
            self.steps(model, experts, report["steps"])
            for rows in args.rows:
                self.one_layer(model, experts, rows, report["experts"])
        report["limits"] = self.limits.facts()
        self.save()
        print(tables(report), flush=True)

    def steps(self, model, experts, into):
        args, measure = self.args, self.measure
        settings = [("decode", mode, batch) for batch in args.batch for mode in args.modes]
        if experts != "batched_mm":
            settings.append(("prefill", "eager", 1))
        for work, mode, batch in settings:
            length = f"prompt {args.prompt_tokens}" if work == "prefill" else f"context {args.context}"

            def run():
                model.use(experts)
                if work == "prefill":
                    return model.prefill(args.prompt_tokens, args.repeats)
                model.room_for(experts, batch)
                return model.decode(mode, batch, args.context, args.generate, args.repeats)

            what = f"{model.shape.name}, {experts}, {mode}, {work} of {batch}, {length}"
            found = self.attempt(what, lambda: self.bracketed(run))
            if found:
                setting = {"batch": batch, "prompt_tokens": args.prompt_tokens if work == "prefill" else 0,
                           "context": args.context if work == "decode" else 0}  # fmt: skip
                into.append(measure.step_row(experts, mode, work, setting, *found))
                print(f"{what}: {into[-1]['tokens_per_second']:.4g} tokens/s", file=sys.stderr, flush=True)

    def one_layer(self, model, experts, rows, into):
        if experts == "batched_mm" and rows > max(self.args.batch):
            return
        run = lambda: self.measure.experts_of_one_layer(model, experts, rows, 2 * self.args.repeats)
        found = self.attempt(f"{model.shape.name}, {experts}, one layer of experts, {rows} tokens", lambda: self.bracketed(run))
        if found:
            into.append(self.measure.experts_row(experts, model.shape, rows, *found))

    def wrong(self):
        """Rows of experts that do not agree with f32."""
        rows = [row for report in self.report["reports"] for row in report["experts"]]
        return [row for row in rows if not self.measure.agrees((row["norm_error"], row["element_error"]))]


def table(title, columns, rows):
    lines = [title, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def percent(share):
    return f"{100 * share:.0f} %"


def ratios(rows, key, speed):
    """Of each row, its speed over that of the fastest transformers row of the same setting."""
    best = {}
    for row in rows:
        if row["engine"] != "triton":
            best[key(row)] = max(best.get(key(row), 0.0), speed(row))
    return [f"{speed(row) / best[key(row)]:.2f}" if key(row) in best else "-" for row in rows]


def tables(report):
    model, limits = report["model"], report["limits"]
    head = (
        f"{model['name']}, {model['layers']} layers, bf16, {model['parameters'] / 1e9:.2f} G parameters, {model['active_parameters'] / 1e9:.2f} G active\n"
        f"limits: {limits['bandwidth'] / 1e9:.4g} GB/s copied, {limits['flops'] / 1e12:.4g} TFLOP/s by {limits['routine']}, {limits['gemm_size']} x "
        f"{limits['gemm_size']}\n"
    )
    against = "against the best of transformers"
    columns = ["work", "experts", "mode", "batch", "prompt", "context", "tok/s", "step p50 ms", "MB/tok", "experts/layer", "of copy", "of GEMM"]
    setting = lambda row: (row["work"], row["batch"], row["prompt_tokens"], row["context"])
    of = ratios(report["steps"], setting, lambda row: row["tokens_per_second"])
    steps = [
        [row["work"], row["engine"], row["mode"], str(row["batch"]), str(row["prompt_tokens"] or "-"), str(row["context"] or "-"),
         f"{row['tokens_per_second']:.4g}", f"{1e3 * row['step_seconds']['p50']:.4g}", f"{row['bytes_per_token'] / 1e6:.4g}",
         f"{row['experts_per_layer']:.3g}", percent(row["bandwidth_share"]), percent(row["flops_share"]), ratio]
        for row, ratio in zip(report["steps"], of)
    ]  # fmt: skip
    of = ratios(report["experts"], lambda row: row["rows"], lambda row: 1 / row["seconds"])
    layer = [
        [row["engine"], str(row["rows"]), f"{row['experts']:.3g}", f"{1e6 * row['seconds']:.4g}", percent(row["bandwidth_share"]),
         percent(row["flops_share"]), f"{row['norm_error']:.1e}", ratio]
        for row, ratio in zip(report["experts"], of)
    ]  # fmt: skip
    title = "transformers, with its own experts and with the Triton kernel's. Rates are medians over runs."
    parts = [head, table(title, [*columns, against], steps)]
    columns = ["experts", "tokens", "experts reached", "us", "of copy", "of GEMM", "error", against]
    return "\n".join([*parts, table("The experts of one layer, nothing of them in a cache.", columns, layer)])


def main(argv):
    args = arguments(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    why = missing(args.device)
    if why:
        print(f"skipped: {why}")
        return SKIPPED
    importlib.import_module("transformers").utils.logging.set_verbosity_error()
    session = Session(importlib.import_module("measure"), args)
    right = session.check()
    for name in args.shapes:
        session.shape(SHAPES[name])
    session.save()
    for row in session.wrong():
        print(f"wrong: {row['engine']}, {row['rows']} tokens: {row['norm_error']:.1e} of the norm, {row['element_error']:.1e} in an element")
    measured = any(report["steps"] for report in session.report["reports"])
    if not measured:
        print("nothing could be measured")
    return 0 if right and measured and not session.wrong() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
