"""What transformers computes for a checkpoint: logits, and every decision of every router.

In f32, with its plain implementations of attention and of the experts ("eager"), one sequence, no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

MODES = ("native", "top1", "top2", "soft")


@dataclass
class Routing:
    """One MoE layer: logits [T, E] f32, ids [T, k] i64 and weights [T, k] f32, heaviest first (soft: by expert id)."""

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass
class Forward:
    """One pass: logits [T, V] f32, and the routing of each MoE layer by its number, counted over all layers from 0."""

    logits: torch.Tensor
    routing: dict[int, Routing]


class Reference:
    """A checkpoint in transformers, whose number of experts per token can be set."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self.model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
            output_loading_info=True,
        )
        wrong = {kind: names for kind, names in report.items() if names}
        if wrong:
            raise RuntimeError(f"{folder}: transformers does not load all of it: {wrong}")
        self.model.eval()
        self.routers: dict[int, torch.nn.Module] = {}
        for index, layer in enumerate(self.model.model.layers):
            found = [module for module in layer.modules() if type(module).__name__.endswith("TopKRouter")]
            if len(found) > 1:
                raise RuntimeError(f"layer {index} has {len(found)} routers")
            if found:
                self.routers[index] = found[0]
        if not self.routers:
            raise RuntimeError(f"{folder}: no router found: transformers has changed, or this is no MoE model")
        self.native_k = next(iter(self.routers.values())).top_k
        self.num_experts = next(iter(self.routers.values())).num_experts

    def k_of(self, mode: str) -> int:
        return {"native": self.native_k, "top1": 1, "top2": 2, "soft": self.num_experts}[mode]

    @torch.no_grad()
    def forward(self, ids: list[int], mode: str) -> Forward:
        k = self.k_of(mode)
        self.model.config.num_experts_per_tok = k
        for module in self.model.modules():
            if hasattr(module, "top_k"):
                module.top_k = k
        captured: dict[int, Routing] = {}

        def capture(index: int):
            def hook(_module, _inputs, output):
                logits, weights, chosen = output
                if mode == "soft":
                    chosen, order = chosen.sort(dim=-1)
                    weights = weights.gather(-1, order)
                captured[index] = Routing(logits.float().clone(), chosen.clone(), weights.float().clone())
            return hook

        hooks = [router.register_forward_hook(capture(index)) for index, router in self.routers.items()]
        try:
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()
        for routing in captured.values():
            if routing.ids.shape != (len(ids), k):
                raise RuntimeError(f"asked for {k} experts per token, transformers used {routing.ids.shape[1]}")
        return Forward(logits, captured)

    def greedy(self, ids: list[int], steps: int, mode: str = "native") -> tuple[list[int], float]:
        """The `steps` likeliest next tokens, whatever the end-of-sequence token, and the closest call among them:
        the smallest lead of a chosen token, as a part of the range of the logits."""
        ids, closest = list(ids), float("inf")
        start = len(ids)
        for _ in range(steps):
            last = self.forward(ids, mode).logits[-1]
            best = last.topk(2)
            closest = min(closest, ((best.values[0] - best.values[1]) / (last.max() - last.min())).item())
            ids.append(int(best.indices[0]))
        return ids[start:], closest


def closest_choice(forward: Forward) -> float:
    """The smallest distance between the router logit of a chosen expert and of one that was not, over all tokens."""
    closest = float("inf")
    for routing in forward.routing.values():
        k, experts = routing.ids.shape[1], routing.logits.shape[1]
        if k < experts:
            ordered = routing.logits.sort(dim=-1, descending=True).values
            closest = min(closest, (ordered[:, k - 1] - ordered[:, k]).min().item())
    return closest
