#!/usr/bin/env python3
"""Copies models/demo and breaks it, so that the alerts of a real Prometheus have something to say.

    checkpoint.py SOURCE DESTINATION

Layer 1 gets a dead expert: the router row of expert 0 is the mean of the others, so it never has the largest logit. Layers 2 and 3 get a
router that hardly decides: its logits are a twentieth, so the mixture is nearly even, and top-1 is far from it. Needs Python alone.
"""

import array
import json
import shutil
import struct
import sys
from pathlib import Path

ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


def rows(values, width):
    return [values[start : start + width] for start in range(0, len(values), width)]


def with_dead_expert(values, width):
    others = rows(values, width)[1:]
    mean = [sum(column) / len(others) for column in zip(*others)]
    return array.array("f", mean) + values[width:]


def undecided(values, _width):
    return array.array("f", (value / 20 for value in values))


def main(source, destination):
    source, destination = Path(source), Path(destination)
    destination.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, destination)
    data = bytearray((source / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for layer, change in ((1, with_dead_expert), (2, undecided), (3, undecided)):
        tensor = header[ROUTER.format(layer)]
        assert tensor["dtype"] == "F32" and sys.byteorder == "little", "the demo has f32 routers, and so has this machine"
        begin, end = (8 + length + offset for offset in tensor["data_offsets"])
        values = array.array("f", bytes(data[begin:end]))
        data[begin:end] = change(values, tensor["shape"][1]).tobytes()
    (destination / "model.safetensors").write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
