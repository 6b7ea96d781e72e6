"""The routed experts of one MoE layer as two Triton kernels: what peer.py measures beside transformers.

T tokens, D width of the model, F width of an expert, E experts, K of them for each token, R = T K routed rows. `x [T, D]`, `gate_up
[E, 2F, D]` (F rows of gates, then F of values), `down [E, D, F]`, all bf16 and row-major; `ids [T, K]` integers, `weights [T, K]` f32.

Routed rows are sorted by expert on the device and cut into tiles of one expert each; the host launches for the most tiles that there can
be, and those in excess return at once. The first kernel gathers rows, multiplies by gates and values side by side, and applies SiLU; the
second multiplies by `down` and weighs. What is left is a sum over K. With few rows there is nothing to sort: every routed row is a tile.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows, columns and depth of a tile, tiles of rows that share columns in a cache, warps, and pipeline stages."""

    rows: int
    columns: int
    depth: int
    group: int = 1
    warps: int = 4
    stages: int = 4
    direct: bool = False


# For rows up to the first number; the first of a list is taken where nothing can be timed.
CANDIDATES = [
    (64, [Tiles(16, 32, 128, direct=True), Tiles(16, 64, 128, direct=True), Tiles(16, 32, 256, stages=3, direct=True), Tiles(16, 64, 128)]),
    (2048, [Tiles(16, 64, 128), Tiles(16, 32, 256, stages=3), Tiles(32, 64, 128), Tiles(64, 64, 64)]),
    (1 << 62, [
        Tiles(128, 128, 64, group=8, warps=8, stages=3),
        Tiles(128, 64, 64, group=8, warps=8, stages=4),
        Tiles(64, 128, 64, group=16, warps=4, stages=4),
        Tiles(128, 128, 32, group=8, warps=8, stages=4),
    ]),
]


@triton.jit
def _place(rows_of, expert_of, experts, tile, ROWS: tl.constexpr, LANES: tl.constexpr, DIRECT: tl.constexpr):
    """The expert of a tile, and its first and last routed row; an expert that does not exist where the tile does not."""
    if DIRECT:
        expert = tl.load(expert_of + tile).to(tl.int32)
        first = tile
        end = tile + 1
    else:
        lane = tl.arange(0, LANES)
        begin = tl.load(rows_of + lane, mask=lane < experts, other=0)
        stop = tl.load(rows_of + lane + 1, mask=lane < experts, other=0)
        tiles = tl.cdiv(stop - begin, ROWS)
        upto = tl.cumsum(tiles, 0)
        expert = tl.sum(((upto <= tile) & (lane < experts)).to(tl.int32), 0)
        mine = lane == expert
        first = tl.sum(tl.where(mine, begin + (tile - upto + tiles) * ROWS, 0), 0)
        end = tl.sum(tl.where(mine, stop, 0), 0)
    return expert, first, end


@triton.jit
def _spot(pid, tiles, columns, GROUP: tl.constexpr):
    """Tile and column block of a program: GROUP tiles go through all columns before the next ones come."""
    span = GROUP * columns
    first = pid // span * GROUP
    height = tl.minimum(tiles - first, GROUP)
    return first + pid % span % height, pid % span // height


@triton.jit
def _load(pointer, edge, inside, EVEN: tl.constexpr):
    """Zeros beyond the edge of a tile, and beyond its depth where the last one is not whole."""
    if EVEN:
        loaded = tl.load(pointer, mask=edge, other=0.0)
    else:
        loaded = tl.load(pointer, mask=edge & inside, other=0.0)
    return loaded


@triton.jit
def _dot(a, b, sums):
    """Adds a product of bf16 matrices, which the interpreter knows only of f32."""
    if INTERPRETED:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit(do_not_specialize=["top_k", "experts", "tiles"])
def _gate_up(
    x, gate_up, hidden, order, rows_of, expert_of, top_k, experts, tiles, D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    tile, block = _spot(tl.program_id(0), tiles, tl.cdiv(F, COLUMNS), GROUP)
    expert, first, end = _place(rows_of, expert_of, experts, tile, ROWS, LANES, DIRECT)
    if expert >= experts:
        return
    row = first + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    slot = row if DIRECT else tl.load(order + row, mask=row < end, other=0)
    a = x + (slot // top_k).to(tl.int64)[:, None] * D + depth[None, :]
    gate = gate_up + expert.to(tl.int64) * 2 * F * D + column[None, :] * D + depth[:, None]
    up = gate + F * D
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        inside = depth < D - start
        rows = _load(a + start, (row < end)[:, None], inside[None, :], D % DEPTH == 0)
        gates = _dot(rows, _load(gate + start, (column < F)[None, :], inside[:, None], D % DEPTH == 0), gates)
        values = _dot(rows, _load(up + start, (column < F)[None, :], inside[:, None], D % DEPTH == 0), values)
    result = gates * tl.sigmoid(gates) * values
    place = hidden + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(place, result.to(tl.bfloat16), mask=(row < end)[:, None] & (column < F)[None, :])


@triton.jit(do_not_specialize=["experts", "tiles"])
def _down(
    hidden, down, weights, out, order, rows_of, expert_of, experts, tiles, D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    tile, block = _spot(tl.program_id(0), tiles, tl.cdiv(D, COLUMNS), GROUP)
    expert, first, end = _place(rows_of, expert_of, experts, tile, ROWS, LANES, DIRECT)
    if expert >= experts:
        return
    row = first + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    a = hidden + row.to(tl.int64)[:, None] * F + depth[None, :]
    b = down + expert.to(tl.int64) * D * F + column[None, :] * F + depth[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, F, DEPTH):
        inside = depth < F - start
        rows = _load(a + start, (row < end)[:, None], inside[None, :], F % DEPTH == 0)
        sums = _dot(rows, _load(b + start, (column < D)[None, :], inside[:, None], F % DEPTH == 0), sums)
    slot = row if DIRECT else tl.load(order + row, mask=row < end, other=0)
    weight = tl.load(weights + slot, mask=row < end, other=0.0).to(tl.float32)
    place = out + slot.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(place, (sums * weight[:, None]).to(tl.bfloat16), mask=(row < end)[:, None] & (column < D)[None, :])


def candidates(routed):
    """The ways to cut `routed` rows that are worth a try."""
    return next(tiles for most, tiles in CANDIDATES if routed <= most)


def fused_moe(x, gate_up, down, ids, weights, tiles=None):
    """The weighted sum of each token's experts, `[T, D]` bf16. Nothing waits for the device."""
    (tokens, width), (experts, _, hidden_width), top_k = x.shape, down.shape, ids.shape[1]
    routed, ids = tokens * top_k, ids.reshape(-1)
    tiles = tiles or candidates(routed)[0]
    order = rows_of = ids
    count = routed
    if not tiles.direct:
        ordered, order = torch.sort(ids, stable=True)
        # Of expert e: rows_of[e] to rows_of[e + 1].
        rows_of = torch.searchsorted(ordered, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype), out_int32=True)
        count = min(routed, routed // tiles.rows + min(routed, experts))
    hidden = torch.empty(routed, hidden_width, dtype=x.dtype, device=x.device)
    out = torch.empty(routed, width, dtype=x.dtype, device=x.device)
    cut = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": tiles.group, "DIRECT": tiles.direct}
    cut |= {"LANES": max(128, triton.next_power_of_2(experts)), "num_warps": tiles.warps, "num_stages": tiles.stages}
    grid = (count * triton.cdiv(hidden_width, tiles.columns),)
    _gate_up[grid](x, gate_up, hidden, order, rows_of, ids, top_k, experts, count, width, hidden_width, **cut)
    grid = (count * triton.cdiv(width, tiles.columns),)
    _down[grid](hidden, down, weights, out, order, rows_of, ids, experts, count, width, hidden_width, **cut)
    return out.view(tokens, top_k, width).sum(1)


def reference(x, gate_up, down, ids, weights):
    """The same in f32, expert by expert, in plain torch."""
    out = torch.zeros(x.shape, device=x.device)
    for expert in ids.unique().tolist():
        token, place = torch.where(ids == expert)
        gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[expert].float().T
        out.index_add_(0, token, rows * weights[token, place, None].float())
    return out
