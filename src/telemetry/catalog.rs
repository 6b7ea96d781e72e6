//! Every series that the server can export, as data. What registers and writes them takes names, labels, buckets and HELP from here,
//! and `docs/metrics.md` is this list in print.

use super::labels::{
    Age, Code, GradientPart, LayerMeasure, LossPart, Method, Mode, Outcome, OutputMeasure, Part, PublishOutcome, Rejection, RollbackReason,
    SampleOutcome, Side, Stage, TunedRouting, TuningState,
};

/// Series that belong together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Section {
    /// For readers.
    pub title: &'static str,
    /// In the order in which they are documented.
    pub families: &'static [Family],
}

/// All series of one name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Family {
    /// As scraped; a histogram adds `_bucket`, `_sum` and `_count`.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// In the order in which their values are given.
    pub labels: &'static [Label],
    /// What is counted.
    pub unit: &'static str,
    /// The HELP line, one or more sentences.
    pub help: &'static str,
    /// When its value changes: the end of the sentence "it moves when ...".
    pub moves: &'static str,
    /// Whether it is there.
    pub presence: Presence,
    /// Of a histogram.
    pub buckets: Buckets,
}

/// Type of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never falls but at a restart.
    Counter,
    /// Rises and falls.
    Gauge,
    /// A gauge that is always 1: the facts are its labels.
    Info,
    /// Observations by size.
    Histogram,
}

/// A label, and which values it can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// As exported.
    pub name: &'static str,
    /// What it can be.
    pub values: Values,
}

/// Values of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// These, all of them from the start.
    OneOf(&'static [&'static str]),
    /// One fact that the server knows, in words.
    Fact(&'static str),
}

/// What decides whether a family is on the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Nothing: it always is.
    Always,
    /// There is one series for each MoE layer.
    PerLayer,
    /// There is one series for each expert of each MoE layer.
    PerExpert,
    /// Requests are measured against the reference routing.
    Shadow,
    /// The same, and there is one series for each MoE layer.
    ShadowPerLayer,
    /// The server can tune its model.
    Tuning,
    /// It is known to others by this name.
    VllmAlias,
}

/// Upper ends of the buckets of a histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Buckets {
    /// Not a histogram.
    None,
    /// These.
    Fixed(&'static [f64]),
    /// 1, 2, 5, 10, 20, ... up to the context of the model.
    UpToContext,
}

/// Of the time to the first token, in seconds; those of vLLM, so that dashboards compare.
const FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];

/// Of the time per token or step, in seconds; those of vLLM with three smaller ones for small models.
const TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];

/// Of the time per request and of its parts, in seconds; those of vLLM.
const REQUEST_BUCKETS: &[f64] =
    &[0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];

/// Of the parts of a step, in seconds: the smallest are for the engine's own part.
const PART_BUCKETS: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];

/// Of the requests of a step.
const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Of the tokens of a step.
const STEP_BUCKETS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Of the tokens that one expert gets in one step.
pub(super) const EXPERT_BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// Of a turn of tuning, in seconds: requests wait for its end.
pub(super) const TURN_BUCKETS: &[f64] = &[0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Of the gap of a layer: distances and shares, from rounding to another function.
pub(super) const LAYER_GAP_BUCKETS: &[f64] = &[0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0];

/// Of the gap at the logits: nats, but for the relative distance.
pub(super) const OUTPUT_GAP_BUCKETS: &[f64] = &[0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

const MODEL: Label = Label { name: "model", values: Values::Fact("name of the served model") };
const LAYER: Label = Label { name: "layer", values: Values::Fact("decoder layer, from 0") };
const EXPERT: Label = Label { name: "expert", values: Values::Fact("expert of the layer, from 0") };
const METHOD: Label = Label { name: "method", values: Values::OneOf(Method::LABELS) };
const CODE: Label = Label { name: "code", values: Values::OneOf(Code::LABELS) };
const OUTCOME: Label = Label { name: "reason", values: Values::OneOf(Outcome::LABELS) };
const REJECTION: Label = Label { name: "reason", values: Values::OneOf(Rejection::LABELS) };
const PART: Label = Label { name: "part", values: Values::OneOf(Part::LABELS) };
const LAYER_MEASURE: Label = Label { name: "measure", values: Values::OneOf(LayerMeasure::LABELS) };
const OUTPUT_MEASURE: Label = Label { name: "measure", values: Values::OneOf(OutputMeasure::LABELS) };
const SAMPLE_OUTCOME: Label = Label { name: "outcome", values: Values::OneOf(SampleOutcome::LABELS) };
const SIDE: Label = Label { name: "routing", values: Values::OneOf(Side::LABELS) };
const AGE: Label = Label { name: "age", values: Values::OneOf(Age::LABELS) };
const MODE: Label = Label { name: "mode", values: Values::OneOf(Mode::LABELS) };
const TUNING_STATE: Label = Label { name: "state", values: Values::OneOf(TuningState::LABELS) };
const LOSS_PART: Label = Label { name: "part", values: Values::OneOf(LossPart::LABELS) };
const GRADIENT_PART: Label = Label { name: "part", values: Values::OneOf(GradientPart::LABELS) };
const TUNED_ROUTING: Label = Label { name: "routing", values: Values::OneOf(TunedRouting::LABELS) };
const STAGE: Label = Label { name: "stage", values: Values::OneOf(Stage::LABELS) };
const PUBLISH_OUTCOME: Label = Label { name: "outcome", values: Values::OneOf(PublishOutcome::LABELS) };
const ROLLBACK_REASON: Label = Label { name: "reason", values: Values::OneOf(RollbackReason::LABELS) };
/// As vLLM names [`MODEL`].
const MODEL_NAME: Label = Label { name: "model_name", values: MODEL.values };

const fn fact(name: &'static str, words: &'static str) -> Label {
    Label { name, values: Values::Fact(words) }
}

/// Constants for those who feed them, and all of them in a list.
macro_rules! catalog {
    ($($title:literal { $($id:ident = $family:expr;)+ })+) => {
        $($(pub(super) const $id: Family = $family;)+)+

        /// Every family.
        pub const CATALOG: &[Section] = &[$(Section { title: $title, families: &[$($id),+] }),+];
    };
}

catalog! {
    "Requests" {
        REQUESTS = counter("hardmax_requests_total", "calls", "Calls of the gRPC service that have ended, by method and status.")
            .by(&[METHOD, CODE])
            .moves("a call has ended, however");
        FINISHED = counter("hardmax_request_finished_total", "requests", "Requests that left the engine, by the reason of their end.")
            .by(&[OUTCOME])
            .moves("a request that was let in has ended; a Generate with `n` choices counts once for each");
        REJECTIONS = counter(
            "hardmax_admission_rejections_total",
            "requests",
            "Well-formed requests that were not let into the engine, by reason.",
        )
        .by(&[REJECTION])
        .moves("the queue is full, the deadline is over, the server stops or only tunes, or a prompt does not fit into the context");
        RUNNING = gauge("hardmax_requests_running", "requests", "Requests in the batch now.")
            .moves("a request enters or leaves the batch");
        WAITING = gauge("hardmax_requests_waiting", "requests", "Requests in the queue now.")
            .moves("a request enters or leaves the queue");
        PROMPT_TOKENS = counter(
            "hardmax_prompt_tokens_total",
            "tokens",
            "Tokens of prompts that the model has read; not those found in the cache, and those of a preempted request again.",
        )
        .moves("a step has read a part of a prompt");
        GENERATED_TOKENS = counter("hardmax_generated_tokens_total", "tokens", "Tokens that the model has generated.")
            .moves("a request has another token");
        REQUEST_PROMPT_TOKENS =
            histogram("hardmax_request_prompt_tokens", "tokens", "Tokens of the prompt, of requests that ended well.", Buckets::UpToContext)
                .moves("a request has ended well");
        REQUEST_GENERATED_TOKENS = histogram(
            "hardmax_request_generated_tokens",
            "tokens",
            "Tokens generated, of generations that ended well.",
            Buckets::UpToContext,
        )
        .moves("a generation has ended well");
    }
    "Latency" {
        TIME_TO_FIRST_TOKEN = seconds(
            "hardmax_time_to_first_token_seconds",
            "From submission to the first generated token.",
            FIRST_TOKEN_BUCKETS,
        )
        .moves("a request has its first token");
        INTER_TOKEN_LATENCY =
            seconds("hardmax_inter_token_latency_seconds", "Between two generated tokens of a request.", TOKEN_BUCKETS)
                .moves("a request has another token than its first");
        TIME_PER_OUTPUT_TOKEN = seconds(
            "hardmax_time_per_output_token_seconds",
            "Mean time between two tokens of a request, of generations of at least two tokens that ended well.",
            TOKEN_BUCKETS,
        )
        .moves("such a generation has ended");
        REQUEST_SECONDS =
            seconds("hardmax_request_seconds", "From submission to the end, of requests that ended well.", REQUEST_BUCKETS)
                .moves("a request has ended well");
        QUEUE_SECONDS =
            seconds("hardmax_queue_seconds", "From submission to the first step, of requests that ended well.", REQUEST_BUCKETS)
                .moves("a request has ended well");
        PREFILL_SECONDS = seconds(
            "hardmax_prefill_seconds",
            "From the first step to the first token, or to the end of a score, of requests that ended well.",
            REQUEST_BUCKETS,
        )
        .moves("a request has ended well");
        DECODE_SECONDS =
            seconds("hardmax_decode_seconds", "From the first token to the last, of generations that ended well.", REQUEST_BUCKETS)
                .moves("a generation has ended well");
    }
    "Engine and cache" {
        STEP_SECONDS = seconds("hardmax_step_seconds", "Duration of one step of the model.", TOKEN_BUCKETS)
            .moves("the model has made a step");
        STEP_PART_SECONDS = seconds(
            "hardmax_step_part_seconds",
            "Duration of the parts of a step: the model's attention, experts and rest, and the engine around it.",
            PART_BUCKETS,
        )
        .by(&[MODEL, PART])
        .moves("the model has made a step");
        STEP_TOKENS = histogram(
            "hardmax_step_tokens",
            "tokens",
            "Tokens of one step of the model, over all requests.",
            Buckets::Fixed(STEP_BUCKETS),
        )
        .moves("the model has made a step");
        STEP_REQUESTS =
            histogram("hardmax_step_requests", "requests", "Requests in one step of the model.", Buckets::Fixed(BATCH_BUCKETS))
                .moves("the model has made a step");
        CACHE_USAGE = gauge("hardmax_kv_cache_usage_ratio", "ratio", "Share of the cache blocks that requests hold, 0 to 1.")
            .moves("requests take or give back blocks");
        CACHE_INFO = info("hardmax_kv_cache_info", "Tokens of a cache block, and cache blocks; always 1.").by(&[
            MODEL,
            fact("block_size", "tokens of a block"),
            fact("num_blocks", "blocks"),
        ]);
        PREFIX_QUERIES = counter(
            "hardmax_prefix_cache_queries_total",
            "tokens",
            "Tokens of admitted requests that were looked for in the cache.",
        )
        .moves("a request enters the batch, unless `--prefix-cache off`");
        PREFIX_HITS =
            counter("hardmax_prefix_cache_hits_total", "tokens", "Tokens that were found there and not computed again.")
                .moves("its beginning was computed before");
        PREEMPTIONS = counter("hardmax_preemptions_total", "requests", "Requests that lost their place in the batch to others.")
            .moves("the cache has no free block for a running request");
        ENGINE_PANICS = counter("hardmax_engine_panics_total", "panics", "Panics in the engine's thread; their requests failed.")
            .by(&[])
            .moves("there is a bug");
    }
    "Experts and routing" {
        EXPERT_TOKENS = counter(
            "hardmax_expert_tokens_total",
            "tokens",
            "Tokens routed to the expert. A token counts once for each expert that it is routed to.",
        )
        .per_expert()
        .moves("a step has routed a token to it");
        EXPERT_WEIGHT_SUM =
            counter("hardmax_expert_weight_sum_total", "weight", "Sum of the routing weights given to the expert.")
                .per_expert()
                .moves("a step has routed a token to it");
        EXPERT_UTILIZATION = gauge(
            "hardmax_expert_utilization_ratio",
            "ratio",
            "Tokens of the expert over its fair share in the last 60 s (in steps of 5 s): 1 is fair, 0 is dead. 0 without traffic.",
        )
        .per_expert()
        .moves("the layer's load of the last minute changes");
        LAYER_FAIR_SHARE = gauge(
            "hardmax_layer_fair_share_tokens",
            "tokens",
            "Tokens routed in the layer in the last 60 s over its experts: the fair share of each. With few, an expert is idle by chance.",
        )
        .per_layer()
        .moves("the layer's load of the last minute changes");
        LAYER_BALANCEDNESS = gauge(
            "hardmax_layer_balancedness_ratio",
            "ratio",
            "Mean over largest load of the layer's experts in the last 60 s: 1 is even. 0 without traffic.",
        )
        .per_layer()
        .moves("the layer's load of the last minute changes");
        LAYER_LOAD_CV = gauge(
            "hardmax_layer_load_cv",
            "ratio",
            "Coefficient of variation of the load of the layer's experts in the last 60 s: 0 is even. 0 without traffic.",
        )
        .per_layer()
        .moves("the layer's load of the last minute changes");
        DEAD_EXPERTS =
            gauge("hardmax_dead_experts", "experts", "Experts of the layer without a token in the last 60 s. 0 without traffic.")
                .per_layer()
                .moves("the layer's load of the last minute changes");
        ROUTER_ENTROPY = gauge(
            "hardmax_router_entropy_nats",
            "nats",
            "Entropy of the softmax of the router logits, mean over the tokens of the last 60 s. 0 without traffic.",
        )
        .per_layer()
        .moves("the layer's tokens of the last minute change");
        ROUTER_NEAR_TIES = counter(
            "hardmax_router_near_tie_total",
            "tokens",
            "Tokens whose last chosen and first refused router logit are less than 0.01 apart: rounding may choose the other expert.",
        )
        .per_layer()
        .moves("a step has routed such a token, and not to all experts");
        ROUTER_NON_FINITE = counter(
            "hardmax_router_non_finite_tokens_total",
            "tokens",
            "Tokens whose router logits were not finite; their requests failed.",
        )
        .per_layer()
        .moves("weights or activations are broken");
        EXPERT_BATCH_TOKENS = histogram(
            "hardmax_expert_batch_tokens",
            "tokens",
            "Tokens that one expert of one layer got in one step, of those that got any.",
            Buckets::Fixed(EXPERT_BATCH_BUCKETS),
        )
        .moves("the model has made a step");
        ROUTING_INFO = info(
            "hardmax_routing_info",
            "Routing in force, routing of the training, and how the router was trained; always 1.",
        )
        .by(&[
            MODEL,
            fact("serving", "routing of requests that choose none"),
            fact("reference", "routing that the checkpoint was trained under"),
            fact("estimator", "`train.estimator` of the checkpoint"),
        ]);
    }
    "Fidelity of the traffic" {
        ROUTING_GAP = histogram(
            "hardmax_routing_fidelity_gap",
            "ratio",
            "Gap of a layer per token of shadow samples, reference against serving routing, of requests that were served under the routing \
             in force. For equal input: l2_rel and cosine_distance of the layer's output, and missed_mass, the reference weight outside \
             the served experts. Each on its own hidden state: expert_disagree, the share of served experts that the reference would not \
             have taken, and argmax_disagree, 1 where the first expert is another.",
            Buckets::Fixed(LAYER_GAP_BUCKETS),
        )
        .shadow()
        .per_layer_measure()
        .moves("a sample is measured");
        OUTPUT_GAP = histogram(
            "hardmax_output_fidelity_gap",
            "nats or ratio",
            "Gap at the logits per token of shadow samples, of requests that were served under the routing in force: kl is the \
             divergence of the serving from the reference distribution and js that of Jensen and Shannon, in nats; logit_l2 is the \
             relative distance of the centred logits.",
            Buckets::Fixed(OUTPUT_GAP_BUCKETS),
        )
        .shadow()
        .by(&[MODEL, OUTPUT_MEASURE])
        .moves("a sample is measured");
        FIDELITY_SAMPLES = counter(
            "hardmax_fidelity_samples_total",
            "requests",
            "Requests that were to be measured, by outcome: done; same, served under the reference routing, so without a gap and not in \
             the histograms; other_routing, not served under the routing in force when they were to be counted, so not in the histograms \
             either, and measured only if they asked for it or the routing changed meanwhile; dropped for a full queue, for want of time \
             within --shadow-budget, for either though they asked, as too short, or because the server stops; failed. With --shadow-rate 0 only those that ask for it \
             themselves.",
        )
        .shadow()
        .by(&[MODEL, SAMPLE_OUTCOME])
        .moves("a sample has come to an end");
        FIDELITY_PENDING =
            gauge("hardmax_fidelity_samples_pending", "requests", "Shadow samples that wait or are being measured now.")
                .shadow()
                .moves("a request that was taken as a sample has ended, or a sample is done");
        FIDELITY_TOKENS =
            counter("hardmax_fidelity_tokens_total", "tokens", "Tokens of shadow samples whose logits were compared.")
                .shadow()
                .moves("a sample is measured");
        OUTPUT_TOP1_DISAGREEMENTS = counter(
            "hardmax_output_top1_disagreements_total",
            "tokens",
            "Of those, tokens whose likeliest next token is another under the serving routing.",
        )
        .shadow()
        .moves("a sample is measured that has such a token");
        FIDELITY_PREDICTED_TOKENS = counter(
            "hardmax_fidelity_predicted_tokens_total",
            "tokens",
            "Tokens of shadow samples that were predicted from those before.",
        )
        .shadow()
        .moves("a sample is measured");
        FIDELITY_NLL = counter(
            "hardmax_fidelity_nll_nats_total",
            "nats",
            "Negative log-likelihood of the predicted tokens under each routing.",
        )
        .shadow()
        .by(&[MODEL, SIDE])
        .moves("a sample is measured");
        SHADOW_SECONDS = counter(
            "hardmax_shadow_seconds_total",
            "seconds",
            "Time that the engine spent on shadow samples, between the steps of requests.",
        )
        .shadow()
        .moves("a piece of a sample has run");
    }
    "Generations and tuning" {
        GENERATION = gauge("hardmax_generation", "generation", "Number of the weights in force: those that a request which comes now runs on.")
            .moves("weights are published or rolled back");
        GENERATIONS_RESIDENT = gauge(
            "hardmax_generations_resident",
            "generations",
            "Generations that requests run on, the one in force included.",
        )
        .moves("weights are published, or the last request of older ones has ended");
        GENERATION_REQUESTS =
            gauge("hardmax_generation_requests", "requests", "Requests inside, by whether the weights that they run on are in force.")
                .by(&[MODEL, AGE])
                .moves("a request comes or ends, or weights are published");
        MODE_OF_SERVER = gauge(
            "hardmax_mode",
            "mode",
            "1 for what the machine is given to, 0 for the rest: serve, requests; tune, requests and a tuning job within its share; \
             tune_exclusive, a tuning job alone.",
        )
        .by(&[MODEL, MODE])
        .moves("a tuning job begins, ends, or gets another share");
        TUNING_JOBS = gauge("hardmax_tuning_jobs", "jobs", "Tuning jobs that the server keeps, by state.")
            .tuning()
            .by(&[MODEL, TUNING_STATE])
            .moves("a job begins, ends, or is forgotten for its age");
        TUNING_INFO = info("hardmax_tuning_info", "The tuning job that the series below are of; always 1, and absent before the first.")
            .tuning()
            .by(&[
                MODEL,
                fact("job", "its identifier"),
                fact("target", "what learns: `router`, `router+experts`, `all`, or names"),
                fact("estimator", "how its routers learn"),
            ]);
        TUNING_STEP = gauge("hardmax_tuning_step", "steps", "Steps that the job has done.").tuning().moves("a step is done");
        TUNING_STEPS = gauge("hardmax_tuning_steps", "steps", "Steps that the job is to do.").tuning().moves("a job begins");
        TUNING_LOSS = gauge(
            "hardmax_tuning_loss",
            "nats",
            "Loss of the last step: total, and its parts lm (next token), distill (divergence from the teacher, by its weight) and auxiliary (the rest \
             of the total). 0 where there is no such part.",
        )
        .tuning()
        .by(&[MODEL, LOSS_PART])
        .moves("a step is done");
        TUNING_GRADIENT_NORM = gauge(
            "hardmax_tuning_gradient_norm",
            "norm",
            "L2 norm of the gradient of the last step before clipping; 0 where it was not finite.",
        )
        .tuning()
        .by(&[MODEL, GRADIENT_PART])
        .moves("a step is done");
        TUNING_GAP = gauge(
            "hardmax_tuning_gap_nats",
            "nats",
            "Own gap on held-out text: mean divergence of a hard routing from the reference routing of the same weights, per token.",
        )
        .tuned()
        .moves("the job has evaluated its weights");
        TUNING_PERPLEXITY_RATIO = gauge(
            "hardmax_tuning_perplexity_ratio",
            "ratio",
            "Perplexity on held-out text under a hard routing, over that of the weights before under their reference routing.",
        )
        .tuned()
        .moves("the job has evaluated its weights");
        TUNING_DEAD_EXPERTS = gauge(
            "hardmax_tuning_dead_experts",
            "experts",
            "Experts that no held-out token goes to under a hard routing, all layers together.",
        )
        .tuned()
        .moves("the job has evaluated its weights, and the number is another");
        TUNING_TOKENS = counter("hardmax_tuning_tokens_total", "tokens", "Tokens that jobs have learned from.")
            .tuning()
            .moves("a step is done");
        TUNING_SKIPPED_STEPS =
            counter("hardmax_tuning_skipped_steps_total", "steps", "Steps that changed nothing, for gradients that were not finite.")
                .tuning()
                .moves("a step is done and the gradients are not finite: a learning rate is too high, or a temperature too low");
        TUNING_TURN_SECONDS = seconds(
            "hardmax_tuning_turn_seconds",
            "Duration of a turn: a piece of tuning for which the engine waits.",
            TURN_BUCKETS,
        )
        .tuning()
        .moves("a turn has ended");
        TUNING_ETA = gauge("hardmax_tuning_eta_seconds", "seconds", "Estimated time to the last step; 0 where no job runs.")
            .tuning()
            .moves("a step is done");
        PUBLISHES = counter(
            "hardmax_publishes_total",
            "publishes",
            "Wishes to put a candidate in force: published; refused, for gates that were not met; overridden, published all the same; \
             failed.",
        )
        .tuning()
        .by(&[MODEL, PUBLISH_OUTCOME])
        .moves("a Publish has been answered");
        ROLLBACKS = counter(
            "hardmax_rollbacks_total",
            "rollbacks",
            "Returns to older weights: asked for, or by the server itself, because the gap of the traffic had grown or requests failed.",
        )
        .tuning()
        .by(&[MODEL, ROLLBACK_REASON])
        .moves("older weights are in force again");
    }
    "Server" {
        BUILD_INFO = info("hardmax_build_info", "The server; always 1.").by(&[
            fact("version", "of hardmax"),
            fact("git", "commit that it was built from, or `unknown`"),
        ]);
        MODEL_INFO = info("hardmax_model_info", "The served model; always 1.").by(&[
            MODEL,
            fact("generation", "of the weights in force"),
            fact("dtype", "of the large weights"),
            fact("device", "`cpu` or `cuda`"),
            fact("layers", "decoder layers"),
            fact("experts", "of a layer, the most of any"),
            fact("top_k", "experts per token under the serving routing, the most of any layer"),
        ]);
        METRICS_SERIES = gauge("hardmax_metrics_series", "series", "Time series on this page.")
            .by(&[])
            .moves("the server is started with other flags or another model");
    }
    "Aliases for gateways" {
        VLLM_RUNNING = gauge("vllm:num_requests_running", "requests", "Requests in the batch now, as hardmax_requests_running.")
            .vllm_alias()
            .moves("a request enters or leaves the batch");
        VLLM_WAITING = gauge("vllm:num_requests_waiting", "requests", "Requests in the queue now, as hardmax_requests_waiting.")
            .vllm_alias()
            .moves("a request enters or leaves the queue");
        VLLM_CACHE_USAGE = gauge(
            "vllm:kv_cache_usage_perc",
            "ratio",
            "Share of the cache blocks that requests hold, 0 to 1 in spite of its name, as hardmax_kv_cache_usage_ratio.",
        )
        .vllm_alias()
        .moves("requests take or give back blocks");
        VLLM_CACHE_INFO =
            info("vllm:cache_config_info", "Tokens of a cache block, and cache blocks, as hardmax_kv_cache_info; always 1.")
                .vllm_alias()
                .by(&[MODEL_NAME, fact("block_size", "tokens of a block"), fact("num_gpu_blocks", "blocks, wherever they are")]);
    }
}

/// Every family of every section.
pub fn families() -> impl Iterator<Item = &'static Family> {
    CATALOG.iter().flat_map(|section| section.families)
}

const fn counter(name: &'static str, unit: &'static str, help: &'static str) -> Family {
    family(name, Kind::Counter, unit, help)
}

const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Family {
    family(name, Kind::Gauge, unit, help)
}

const fn info(name: &'static str, help: &'static str) -> Family {
    family(name, Kind::Info, "always 1", help).moves("a fact changes: the series with the old labels ends and another begins")
}

const fn histogram(name: &'static str, unit: &'static str, help: &'static str, buckets: Buckets) -> Family {
    Family { buckets, ..family(name, Kind::Histogram, unit, help) }
}

const fn seconds(name: &'static str, help: &'static str, buckets: &'static [f64]) -> Family {
    histogram(name, "seconds", help, Buckets::Fixed(buckets))
}

/// Labelled by the model, always there.
const fn family(name: &'static str, kind: Kind, unit: &'static str, help: &'static str) -> Family {
    Family { name, kind, labels: &[MODEL], unit, help, moves: "", presence: Presence::Always, buckets: Buckets::None }
}

impl Family {
    const fn by(mut self, labels: &'static [Label]) -> Self {
        self.labels = labels;
        self
    }

    const fn moves(mut self, when: &'static str) -> Self {
        self.moves = when;
        self
    }

    const fn per_layer(mut self) -> Self {
        self.presence = Presence::PerLayer;
        self.by(&[MODEL, LAYER])
    }

    const fn per_expert(mut self) -> Self {
        self.presence = Presence::PerExpert;
        self.by(&[MODEL, LAYER, EXPERT])
    }

    const fn shadow(mut self) -> Self {
        self.presence = Presence::Shadow;
        self
    }

    const fn per_layer_measure(mut self) -> Self {
        self.presence = Presence::ShadowPerLayer;
        self.by(&[MODEL, LAYER, LAYER_MEASURE])
    }

    const fn tuning(mut self) -> Self {
        self.presence = Presence::Tuning;
        self
    }

    /// Measured before the first step and last, under each routing.
    const fn tuned(self) -> Self {
        self.tuning().by(&[MODEL, TUNED_ROUTING, STAGE])
    }

    const fn vllm_alias(mut self) -> Self {
        self.presence = Presence::VllmAlias;
        self.by(&[MODEL_NAME])
    }
}

impl Kind {
    /// As the TYPE line says it.
    pub fn exported(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge | Self::Info => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_and_texts_follow_the_conventions() {
        let mut names = HashSet::new();
        for family in families() {
            let Family { name, kind, labels, unit, help, moves, presence, buckets } = *family;
            assert!(names.insert(name), "{name} twice");
            assert!(name.starts_with("hardmax_") || presence == Presence::VllmAlias, "{name}");
            assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
            assert_eq!(name.ends_with("_info"), kind == Kind::Info, "{name}");
            assert_eq!(buckets == Buckets::None, kind != Kind::Histogram, "{name}");
            assert!(!unit.is_empty() && !moves.is_empty() && !moves.ends_with('.'), "{name}");
            assert!(help.ends_with('.') && !help.contains(['"', '\n', '\\', '|']), "{name}: {help}");
            let distinct: HashSet<&str> = labels.iter().map(|label| label.name).collect();
            assert_eq!(distinct.len(), labels.len(), "{name}");
        }
    }

    #[test]
    fn buckets_ascend() {
        for family in families() {
            if let Buckets::Fixed(bounds) = family.buckets {
                assert!(bounds.is_sorted_by(|a, b| a < b), "{}", family.name);
            }
        }
    }
}
