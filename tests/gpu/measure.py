"""What peer.py measures: limits of the machine, decoding and prefill by transformers, and the experts of one layer.

All times on a GPU are between CUDA events. Work of a step is prepared before it, so that what is timed is the model.
"""

import statistics
import time
from contextlib import contextmanager

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fused_moe
from shapes import BF16, experts_cost, step_cost

TRITON = "triton"

# Standard deviations of router logits and of logits for a normalised input, as in the synthetic models of `hardmax bench`.
ROUTER_SPREAD, HEAD_SPREAD = 1.5, 2.5

# Written between two timed calls, so that neither finds its weights in a cache: larger than any last-level cache of a GPU.
FLUSH_BYTES = 256 << 20

# Largest error of the Triton kernel against f32: of the whole in the Euclidean norm, and of one element in terms of itself and the root
# mean square. Three roundings to bf16 make about a third of the first.
NORM_TOLERANCE, ELEMENT_TOLERANCE = 2**-6, 2**-4


class LeftOut(Exception):
    """Why something was not measured."""


class Clock:
    """Times pieces of work on a device, one after the other."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def laps(self, works, between=None):
        """Seconds of each of `works`, without waiting in between; `between` runs before each and is not timed."""
        marks = []
        for work in works:
            if between:
                between()
            begin = self._mark()
            work()
            marks.append((begin, self._mark()))
        if self.cuda:
            torch.cuda.synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in marks]
        return [end - begin for begin, end in marks]

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Limits:
    """Copy bandwidth and bf16 products of this machine, read again and again."""

    SAMPLES = 3

    def __init__(self, device, buffer_bytes, gemm_size):
        self.clock, self.buffer_bytes, self.gemm_size = Clock(device), buffer_bytes, gemm_size
        self.source = torch.ones(buffer_bytes // 4, dtype=torch.int32, device=device)
        self.target = torch.empty_like(self.source)
        self.left, self.right = (torch.randn(gemm_size, gemm_size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.product = torch.empty_like(self.left)
        self.readings = {"bandwidth": [], "flops": []}
        self.read()
        self.readings = {"bandwidth": [], "flops": []}

    def read(self):
        """Readings of now: bytes read and written, and operations, per second."""
        copies = self.clock.laps([lambda: self.target.copy_(self.source)] * self.SAMPLES)
        products = self.clock.laps([lambda: torch.mm(self.left, self.right.T, out=self.product)] * self.SAMPLES)
        now = {
            "bandwidth": [2 * self.source.numel() * 4 / seconds for seconds in copies],
            "flops": [2 * self.gemm_size**3 / seconds for seconds in products],
        }
        for name, values in now.items():
            self.readings[name] += values
        return now

    def facts(self):
        """As the report of `hardmax bench` has them."""
        facts = {"buffer_bytes": self.buffer_bytes, "gemm_size": self.gemm_size, "routine": "torch.mm of bf16"}
        return facts | medians(self.readings) | {"readings": self.readings}


def medians(readings):
    return {name: statistics.median(values) for name, values in readings.items()}


def percentile(values, percent):
    """Linearly between neighbours."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def latency(values):
    return {"count": len(values)} | {f"p{p}": percentile(values, p) for p in (50, 90, 99)} | {"max": max(values)}


def error_of(result, expected):
    """Both errors of ELEMENT_TOLERANCE and NORM_TOLERANCE; infinite where something is not a number."""
    difference = result.float() - expected
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    errors = (difference.norm() / expected.norm().clamp_min(1e-30)).item(), (difference.abs() / (expected.abs() + scale)).max().item()
    return tuple(error if error == error else float("inf") for error in errors)


def agrees(errors):
    return errors[0] <= NORM_TOLERANCE and errors[1] <= ELEMENT_TOLERANCE


def routing(rows, experts, top_k, device):
    """Ids and bf16 weights of `rows` random tokens, as a router would choose."""
    chosen = (ROUTER_SPREAD * torch.randn(rows, experts, device=device)).softmax(-1).topk(top_k, dim=-1)
    return chosen.indices, (chosen.values / chosen.values.sum(-1, keepdim=True)).bfloat16()


def check_cases(device):
    """Name and operands of small problems: one token, ragged loads, experts without rows, all rows to one, sizes that no tile divides."""
    def case(name, rows, hidden, width, experts, top_k, ids=None):
        random = torch.randn(3, max(rows * hidden, experts * 2 * width * hidden), device=device)
        x = random[0, : rows * hidden].view(rows, hidden).bfloat16()
        gate_up = (random[1, : experts * 2 * width * hidden] / hidden**0.5).view(experts, 2 * width, hidden).bfloat16()
        down = (random[2, : experts * hidden * width] / width**0.5).view(experts, hidden, width).bfloat16()
        drawn, weights = routing(rows, experts, top_k, device)
        return name, (x, gate_up, down, drawn if ids is None else ids.to(device), weights)

    # The kernels are compiled for each pair of widths: two pairs, of which the tiles divide one.
    yield case("one token", 1, 256, 256, 4, 2)
    yield case("ragged", 21, 80, 40, 6, 3)
    yield case("all to one expert", 19, 80, 40, 5, 1, torch.full((19, 1), 3))
    yield case("empty experts", 9, 80, 40, 16, 2, torch.tensor([[0, 15]] * 8 + [[7, 0]]))
    yield case("more experts than lanes", 3, 80, 40, 130, 2, torch.tensor([[129, 0], [64, 129], [1, 2]]))


@contextmanager
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_kernel(device):
    """Every way to cut the work against f32, on every case."""
    cuts = list(dict.fromkeys(tiles for _, cuts in fused_moe.CANDIDATES for tiles in cuts))
    rows = []
    for name, operands in check_cases(device):
        expected = fused_moe.reference(*operands)
        for tiles in cuts:
            with poisoned():
                errors = error_of(fused_moe.fused_moe(*operands, tiles), expected)
            rows.append({"case": name, "tiles": str(tiles), "norm_error": errors[0], "element_error": errors[1], "passed": agrees(errors)})
    return rows


class Tuned:
    """The Triton experts, cut in the way that was fastest when so many rows were first seen."""

    def __init__(self, clock):
        self.clock, self.best = clock, {}

    def __call__(self, experts, x, ids, weights):
        operands = (x, experts.gate_up_proj, experts.down_proj, ids, weights)
        key = (ids.numel(), *experts.down_proj.shape)
        if key not in self.best:
            self.best[key] = self._fastest(operands) if self.clock.cuda else fused_moe.candidates(ids.numel())[0]
        return fused_moe.fused_moe(*operands, self.best[key])

    def _fastest(self, operands):
        times = {}
        for tiles in fused_moe.candidates(operands[3].numel()):
            run = lambda tiles=tiles: fused_moe.fused_moe(*operands, tiles)
            try:
                run()
                times[tiles] = statistics.median(self.clock.laps([run] * 5))
            except fused_moe.triton.runtime.errors.OutOfResources:
                continue  # Less shared memory than on Hopper.
        if not times:
            raise LeftOut("no way to cut the work fits into the shared memory of this GPU")
        return min(times, key=times.get)


def config_of(shape, context):
    """For transformers."""
    common = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": context, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if shape.family == "olmoe":
        return transformers.OlmoeConfig(intermediate_size=shape.width, num_experts=shape.experts, **common)
    if shape.family == "qwen3_moe":
        own = {"moe_intermediate_size": shape.width, "num_experts": shape.experts, "head_dim": shape.head_dim, "norm_topk_prob": True}
        return transformers.Qwen3MoeConfig(**own, **common)
    return transformers.MixtralConfig(intermediate_size=shape.width, num_local_experts=shape.experts, head_dim=shape.head_dim, **common)


class Model:
    """A model of transformers with random bf16 weights, made on the device."""

    def __init__(self, shape, context, device, modes, tuned):
        self.shape, self.device, self.clock, self.modes = shape, device, Clock(device), modes
        ALL_EXPERTS_FUNCTIONS.register(TRITON, tuned)
        with torch.device(device):
            config = config_of(shape, context)
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        for name, parameter in self.model.named_parameters():
            fill(name, parameter)
        self.experts = self.model.model.layers[0].mlp.experts

    def use(self, experts):
        """Which implementation of the experts runs."""
        self.model.set_experts_implementation(experts)

    def room_for(self, experts, tokens):
        """Fails where `batched_mm`, which copies the weights of every routed row, would fill half of what memory is left."""
        copied = tokens * self.shape.top_k * self.shape.expert_weights * BF16
        if experts == "batched_mm" and self.device.type == "cuda" and copied > free_memory() / 2:
            raise LeftOut(f"batched_mm would copy {copied / 1e9:.0f} GB of weights for {tokens} tokens")

    def tokens(self, *shape):
        return torch.randint(self.shape.vocab, shape, device=self.device)

    def reached(self, run):
        """Experts that a layer reads in one run, on average over layers."""
        counts = []
        hooks = [
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, kwargs: counts.append(ids_of(args, kwargs)), with_kwargs=True)
            for layer in self.model.model.layers
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return statistics.mean(len(ids.unique()) for ids in counts)

    def prefill(self, prompt_tokens, repeats):
        """Seconds of each run over one prompt, a list of one step for each, and the cost of one."""
        prompts = [self.tokens(1, prompt_tokens) for _ in range(repeats + 1)]
        read = lambda prompt: self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        experts = self.reached(lambda: read(prompts[0]))
        runs = self.clock.laps([lambda prompt=prompt: read(prompt) for prompt in prompts[1:]])
        return [[seconds] for seconds in runs], step_cost(self.shape, 1, prompt_tokens, 0, experts), experts

    def decode(self, mode, batch, context, steps, repeats):
        """Seconds of each step of each run, and the cost of a step in the middle of one."""
        sequences = Sequences(self, batch, context, steps)
        experts = self.reached(sequences.step)
        advance = sequences.prepared(mode)
        runs = []
        for _ in range(repeats):
            tokens = self.tokens(steps, batch, 1)
            sequences.rewind()
            place = iter(tokens)
            runs.append(self.clock.laps([advance] * steps, between=lambda place=place: sequences.input.copy_(next(place))))
        return runs, step_cost(self.shape, batch, 1, context + steps // 2, experts), experts


def free_memory():
    """Bytes on the GPU, with what torch keeps for later given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def ids_of(args, kwargs):
    return kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]


def fill(name, parameter):
    """Linear maps keep the variance of a normalised input; the wider rows of router and head tell experts and tokens apart."""
    with torch.no_grad():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            return
        spread = ROUTER_SPREAD if name.endswith("gate.weight") else HEAD_SPREAD if name.startswith("lm_head") else 1.0
        embedding = "embed_tokens" in name
        parameter.normal_(0.0, 1.0 if embedding else spread / parameter.shape[-1] ** 0.5)


class Sequences:
    """Sequences with random keys and values in a static cache, which decode a token each per step."""

    def __init__(self, of, batch, context, steps):
        self.model, self.context = of.model, context
        self.input = of.tokens(batch, 1)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=of.device)
        # One place more for the step that is not timed.
        self.places = torch.arange(context + steps + 1, device=of.device)
        self.cache = transformers.StaticCache(config=of.model.config, max_cache_len=len(self.places))
        self.cuda = of.device.type == "cuda"
        self.step()
        for layer in self.cache.layers:
            if not hasattr(layer, "cumulative_length"):
                raise LeftOut(f"the static cache of transformers {transformers.__version__} cannot be wound back; 5.17 to 5.23 are known to work")
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    def rewind(self):
        self.position.fill_(self.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def step(self):
        """One forward. The mask is made here, by operations that a CUDA graph can hold."""
        mask = (self.places <= self.position)[None, None].expand(len(self.input), 1, 1, -1)
        logits = self.forward(mask)
        self.position.add_(1)
        return logits

    def forward(self, mask):
        position = self.position.expand(len(self.input), 1)
        out = self.model(input_ids=self.input, attention_mask=mask, position_ids=position, past_key_values=self.cache, use_cache=True)
        return out.logits

    def prepared(self, mode):
        """The step to be timed, warmed up: as it is, or replayed from a CUDA graph, of a compiled model where `mode` says so."""
        if mode == "compile":
            torch.compiler.reset()  # Else the limit of recompilations is soon reached, and what runs is not compiled.
            self.forward = torch.compile(self.forward, dynamic=False)
        for _ in range(2):
            self.rewind()
            self.step()
        if mode == "eager" or not self.cuda:
            return self.step
        return captured(self.step)


def captured(work):
    """A CUDA graph of what `work` does, ready to be replayed."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        raise LeftOut(f"no CUDA graph could be made: {str(error).splitlines()[0]}") from error
    return graph.replay


def experts_of_one_layer(model, experts, rows, repeats):
    """Seconds of each call of the first layer's experts on `rows` random tokens, the experts reached, and the errors against f32."""
    shape, device, clock = model.shape, model.device, model.clock
    model.use(experts)
    model.room_for(experts, rows)
    x = torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device=device)
    ids, weights = routing(rows, shape.experts, shape.top_k, device)
    run = lambda: model.experts(x, ids, weights)
    layer = model.experts
    errors = error_of(run(), fused_moe.reference(x, layer.gate_up_proj, layer.down_proj, ids, weights))
    work = captured(run) if clock.cuda else run
    reached = []

    def prepare():
        for old, new in zip((ids, weights), routing(rows, shape.experts, shape.top_k, device)):
            old.copy_(new)
        reached.append(ids.unique().numel())
        if clock.cuda:
            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).fill_(1)

    seconds = clock.laps([work] * repeats, between=prepare)
    return seconds, statistics.mean(reached), errors


def step_row(engine, mode, work, setting, result, readings):
    """One row of `steps`, with the names that the report of `hardmax bench` has."""
    runs, cost, experts = result
    rates = [cost.tokens * len(run) / sum(run) for run in runs]
    rate, limit = statistics.median(rates), medians(readings)
    return {
        "engine": engine, "mode": mode, "work": work, "routing": "native", **setting,
        "tokens_per_second": rate,
        "prefill_tokens_per_second": rate if work == "prefill" else 0.0,
        "decode_tokens_per_second": rate if work == "decode" else 0.0,
        "runs": rates,
        "step_seconds": latency([seconds for run in runs for seconds in run]),
        "median_step_seconds": statistics.median(statistics.median(run) for run in runs),
        "bytes_per_token": cost.bytes_per_token,
        "flops_per_token": cost.flops_per_token,
        "experts_per_layer": experts,
        "weight_bandwidth": cost.weight_bytes / cost.tokens * rate,
        "limit": limit,
        "readings": readings,
        "bandwidth_share": cost.bytes_per_token * rate / limit["bandwidth"],
        "flops_share": cost.flops_per_token * rate / limit["flops"],
    }  # fmt: skip


def experts_row(engine, shape, rows, result, readings):
    """One row of `experts_of_one_layer`."""
    seconds, reached, errors = result
    median, limit = statistics.median(seconds), medians(readings)
    weight_bytes, flops = experts_cost(shape, rows, reached)
    return {
        "engine": engine, "rows": rows, "experts": reached,
        "seconds": median, "runs": seconds,
        "weight_bytes": weight_bytes, "flops": flops,
        "limit": limit,
        "bandwidth_share": weight_bytes / median / limit["bandwidth"],
        "flops_share": flops / median / limit["flops"],
        "norm_error": errors[0], "element_error": errors[1],
    }  # fmt: skip
