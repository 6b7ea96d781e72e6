"""The shapes that are measured, and what a forward of one has to read and to compute. Plain Python: nothing here needs a GPU.

Bytes and operations are counted as `hardmax bench` counts them (src/bench/cost.rs), with all weights, keys and values in bf16.
"""

from dataclasses import dataclass, replace

BF16 = 2


@dataclass(frozen=True)
class Shape:
    """A decoder, every layer of it routed. `family` is the model type of transformers."""

    name: str
    family: str
    hidden: int
    width: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    @property
    def attention_weights(self):
        """Of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def expert_weights(self):
        """Of one expert."""
        return 3 * self.hidden * self.width

    def parameters(self):
        """All, and those that one token uses; norms left out."""
        fixed = 2 * self.vocab * self.hidden
        layer = self.attention_weights + self.experts * self.hidden
        return tuple(fixed + self.layers * (layer + used * self.expert_weights) for used in (self.experts, self.top_k))

    def cache_bytes(self, tokens):
        """Of the keys and values of so many tokens, over all layers."""
        return 2 * self.kv_heads * self.head_dim * BF16 * self.layers * tokens


@dataclass(frozen=True)
class Cost:
    """Bytes of weights and of keys and values, and operations."""

    tokens: int
    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes_per_token(self):
        return (self.weight_bytes + self.cache_bytes) / self.tokens

    @property
    def flops_per_token(self):
        return self.flops / self.tokens


def step_cost(shape, sequences, new, past, experts):
    """Of a forward of `sequences` with `new` tokens each after `past`, of which each layer reached `experts` experts, on average; logits of
    the last token of each sequence."""
    tokens, layers = sequences * new, shape.layers
    fixed = layers * (shape.attention_weights + shape.experts * shape.hidden)
    head = shape.vocab * shape.hidden
    pairs = sequences * sum(past + place + 1 for place in range(new))
    return Cost(
        tokens=tokens,
        weight_bytes=BF16 * (tokens * shape.hidden + head + fixed + layers * experts * shape.expert_weights),
        cache_bytes=shape.cache_bytes(sequences * (past + 2 * new)),
        flops=2 * (fixed + layers * shape.top_k * shape.expert_weights) * tokens
        + 2 * head * sequences
        + 4 * layers * shape.heads * shape.head_dim * pairs,
    )


def experts_cost(shape, rows, experts):
    """Bytes of weights and operations of the experts of one layer over `rows` tokens that reach `experts` experts."""
    return BF16 * experts * shape.expert_weights, 2 * shape.expert_weights * shape.top_k * rows


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe-1b-7b", "olmoe", 2048, 1024, 64, 8, 16, 16, 128, 50304, 16),
        Shape("qwen3-30b-a3b", "qwen3_moe", 2048, 768, 128, 8, 32, 4, 128, 151936, 48),
        Shape("mixtral-8x7b", "mixtral", 4096, 14336, 8, 2, 32, 8, 128, 32000, 32),
    )
}


def toy(shape):
    """The same family, so small that a CPU runs it under an interpreter."""
    heads, kv_heads = 4, 4 if shape.heads == shape.kv_heads else 2
    return replace(
        shape, hidden=64, width=48, experts=min(shape.experts, 12), top_k=min(shape.top_k, 3), heads=heads, kv_heads=kv_heads, head_dim=16,
        vocab=256, layers=1,
    )  # fmt: skip
