#!/usr/bin/env python3
"""Markdown tables of what run.sh kept: speeds as medians over rounds, and ratios as medians of the ratios within rounds.

    benches/peers/table.py RESULTS
"""

import json
import statistics
import sys
from pathlib import Path

PREFILL1, PREFILL8, EMPTY1, EMPTY8, DECODE1, DECODE8 = COLUMNS = (
    "pp512 b1", "pp512 b8", "tg64 b1, empty", "tg64 b8, empty", "tg64 b1 at 512", "tg64 b8 at 512",
)
TORCH = "transformers, best"

# Engine, weights, and the column whose ratio is asked for, hardmax first; the least ratio that is wanted.
RATIOS = [
    ("f32", "candle", "f32", PREFILL1, 2.8),
    ("f32", "candle", "f32", DECODE1, 2.4),
    ("bf16", "candle", "f32", PREFILL1, 5.0),
    ("bf16", "candle", "f32", DECODE1, 4.5),
    ("bf16", "candle", "f32", DECODE8, 9.0),
    ("bf16", "llama.cpp", "bf16", PREFILL1, 4.0),
    ("bf16", "llama.cpp", "bf16", EMPTY1, 1.0),
    ("bf16", "llama.cpp", "bf16", DECODE1, 1.0),
    ("bf16", "llama.cpp", "bf16", DECODE8, 1.5),
    ("f32", "llama.cpp", "f32", DECODE1, None),
    ("q8", "llama.cpp", "q8", EMPTY1, 1.2),
    ("q8", "llama.cpp", "q8", DECODE1, 1.2),
    ("q8", "llama.cpp", "q8", DECODE8, 1.2),
    ("bf16", TORCH, "", PREFILL1, 1.0),
    ("bf16", TORCH, "", PREFILL8, 1.0),
    ("bf16", TORCH, "", DECODE1, 1.8),
    ("bf16", TORCH, "", DECODE8, 1.5),
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def hardmax(path):
    for step in json.loads(path.read_text())["steps"]:
        if step["work"] == "prefill":
            yield f"pp{step['prompt_tokens']} b{step['batch']}", step["tokens_per_second"]
        elif step["context"] == 0:
            yield f"tg64 b{step['batch']}, empty", step["tokens_per_second"]
        else:
            yield f"tg64 b{step['batch']} at {step['context']}", step["tokens_per_second"]


def llama_bench(path):
    for run in lines(path):
        yield (PREFILL1 if run["n_prompt"] else EMPTY1), statistics.median(run["samples_ts"])


def llama_batched(path):
    for run in lines(path):
        if run["pl"] != 1:
            yield f"pp{run['pp']} b{run['pl']}", run["speed_pp"]
        yield f"tg64 b{run['pl']} at {run['pp']}", run["speed_tg"]


def median(run, key):
    """Of the repeats of a run, where they are kept; otherwise the best one."""
    if f"{key}_all" in run:
        return statistics.median(run[f"{key}_all"])
    return run.get(f"{key}_tps_median", run[f"{key}_tps_best"])


def fastest(path):
    """The fastest of the settings in a file, for each column: of implementations of experts there are several."""
    found = {}
    for run in lines(path):
        if "error" in run:
            continue
        for column, key in (f"pp{run['prefill']} b{run['batch']}", "prefill"), (f"tg64 b{run['batch']} at {run['prefill']}", "decode"):
            found[column] = max(found.get(column, 0.0), median(run, key))
    return found.items()


READERS = {
    "hardmax": ("hardmax", hardmax),
    "llama-bench": ("llama.cpp", llama_bench),
    "llama-batched": ("llama.cpp", llama_batched),
    "candle": ("candle", fastest),
    "torch": ("transformers", fastest),
}


def read(folder):
    """{model: {(engine, weights): {column: speed}}} of one round."""
    found = {}
    for path in sorted(folder.glob("*.json*")):
        kind, model, weights, _ = path.name.split(".")
        engine, reader = READERS[kind]
        try:
            values = dict(reader(path))
        except (ValueError, KeyError) as error:
            print(f"{path}: {error!r}", file=sys.stderr)
            continue
        engines = found.setdefault(model, {})
        engines.setdefault((engine, weights), {}).update(values)
        if engine == "transformers":
            together = engines.setdefault((TORCH, ""), {})
            for column, value in values.items():
                together[column] = max(together.get(column, 0.0), value)
    return found


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rounds = [read(folder) for folder in sorted(Path(sys.argv[1]).glob("round*"))]
    if not rounds:
        sys.exit(f"no round* in {sys.argv[1]}")

    def series(model, key, column):
        values = [r.get(model, {}).get(key, {}).get(column) for r in rounds]
        return [value for value in values if value]

    models = sorted({model for r in rounds for model in r})
    print(f"Tokens per second, medians of {len(rounds)} rounds.\n")
    print("| model | engine | weights | " + " | ".join(COLUMNS) + " |\n|---|---|---|" + "---:|" * len(COLUMNS))
    for model in models:
        for key in sorted({key for r in rounds for key in r.get(model, {}) if key[0] != TORCH}):
            cells = [series(model, key, column) for column in COLUMNS]
            shown = [f"{statistics.median(cell):.3g}" if cell else "-" for cell in cells]
            print("| " + " | ".join([model, *key, *shown]) + " |")
    print("\nRatios within a round: median, and the least and largest of the rounds.\n")
    print("| model | hardmax | against | what | ratio | from - to | wanted |\n|---|---|---|---|---:|---:|---:|")
    for model in models:
        for weights, engine, other, column, wanted in RATIOS:
            ratios = []
            for r in rounds:
                mine = r.get(model, {}).get(("hardmax", weights), {}).get(column)
                theirs = r.get(model, {}).get((engine, other), {}).get(column)
                if mine and theirs:
                    ratios.append(mine / theirs)
            if ratios:
                middle = statistics.median(ratios)
                goal = "-" if wanted is None else f"{wanted:g}" + ("" if middle >= wanted else " (missed)")
                span = f"{min(ratios):.2f} - {max(ratios):.2f}"
                print(f"| {model} | {weights} | {engine} {other} | {column} | {middle:.2f} | {span} | {goal} |")


if __name__ == "__main__":
    main()
