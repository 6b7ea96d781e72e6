"""Random-weight checkpoints in the Hugging Face layout, small and lively enough to show a mistake.

The usual N(0, 0.02) makes the logits of a narrow model almost constant and its router almost uniform, so that a wrong
implementation still agrees with a right one. Here every part of the model has a visible effect:

    linear maps     N(0, 1 / fan_in)                 activations stay near 1 in every layer
    router          logits of standard deviation 1.5, and another factor for each expert, so that load is uneven
    head            logits of standard deviation 2.5
    norm weights    1 + N(0, 0.2)                    a forgotten weight shows
    biases          N(0, 0.2)                        a forgotten bias shows

A tensor depends on the seed and its own name only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Case:
    """A checkpoint to write.

    config      what config.json says, written as given: released checkpoints and newer exports spell things differently
    fused       experts stacked in one tensor and newer names (what transformers 5 holds in memory), instead of one
                tensor for each expert as in the released checkpoints
    dtype       of every tensor in the file
    shard       largest shard, for example "40KB"; None is one file
    differs     changes to the config, as (key, value) pairs, that must each change the logits: proof that the case
                exercises what its name says. A key may be dotted.
    """

    name: str
    config: dict
    fused: bool = False
    dtype: str = "float32"
    shard: str | None = None
    differs: tuple[tuple[str, object], ...] = field(default=())


def write(case: Case, seed: int, out: Path) -> None:
    """Writes config.json and the weights into `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = dict(case.config, torch_dtype=case.dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    fill(model, seed)
    with tempfile.TemporaryDirectory() as tmp:
        model.to(dtype).save_pretrained(
            tmp, save_original_format=not case.fused, max_shard_size=case.shard or "1GB", safe_serialization=True
        )
        for file in sorted(os.listdir(tmp)):
            if file.startswith("model"):
                shutil.copyfile(Path(tmp) / file, out / file)


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Replaces every parameter. See the top of this file for what by what."""
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1]
        if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            value = 0.2 * noise
        elif "embed_tokens" in name:
            # A tied embedding is the head, too; either way the first norm removes the scale.
            value = noise * (2.5 / math.sqrt(fan_in) if model.config.tie_word_embeddings else 1.0)
        elif name.startswith("lm_head"):
            value = noise * 2.5 / math.sqrt(fan_in)
        elif name.endswith(("mlp.gate.weight", "router.weight")):
            spread = torch.exp(0.3 * torch.randn((parameter.shape[0], 1), generator=generator))
            value = noise * spread * 1.5 / math.sqrt(fan_in)
        else:
            value = noise / math.sqrt(fan_in)
        parameter.copy_(value)
