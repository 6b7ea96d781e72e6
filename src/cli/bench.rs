//! `hardmax bench`: flags, and what they mean for the parts of [`crate::bench`].

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use candle_core::DType;
use clap::Args;

use crate::{
    bench::{
        self, Place, Placement, Report, Source, Subject,
        experiment::{Experiment, ExperimentConfig},
        grpc::GrpcConfig,
        limits::LimitConfig,
        soak::SoakConfig,
        steps::{StepsConfig, Work},
        subject::cache_for,
        synthetic::SyntheticSpec,
        target::{ServerLimits, Target},
    },
    error::{Error, Result},
    model::{
        ModelSpec,
        load::{DeviceKind, WeightType},
    },
    moe::policy::RoutingChoice,
    ops::{cpu::Reduction, start_compute_threads},
};

/// Tokens of a prompt where nothing is said, less where the context is shorter.
const DEFAULT_PROMPT: usize = 512;

/// Tokens to generate where nothing is said, less where the context is shorter.
const DEFAULT_GENERATE: usize = 64;

/// Clients through gRPC where nothing is said.
const DEFAULT_CLIENTS: [usize; 3] = [1, 8, 16];

/// Requests in one batch where nothing is said and there are more clients.
const MOST_DEFAULT_BATCH: usize = 64;

/// As above, of a soak.
const DEFAULT_SOAK_CLIENTS: usize = 200;

/// As above, of a soak.
const DEFAULT_SOAK_BATCH: usize = 16;

/// Rows and columns of the matrix product by which the limit of operations is measured, where nothing is said: on a GPU small ones do not fill it.
const DEFAULT_GEMM: (usize, usize) = (2048, 8192);

/// Shape of the experiment with numbers of experts where nothing is said.
const EXPERTS_BASE: &str = "layers=2,hidden=1024,heads=16,kv-heads=4,head-dim=64,expert-width=1408,vocab=1024";

/// Shape of the other experiments where nothing is said.
const EXPERIMENT_MODEL: &str = "mixtral-0.9b,layers=4";

/// Measure the speed of a model, of a server, and how near both are to the limits of this machine.
///
/// By default a model is driven without a server: prefill reads --batch prompts of --prompt-tokens in steps of --step-tokens; decode
/// continues --batch sequences after --context by --generate tokens; mixed does both in one step. Tokens are random. The share of the
/// limits counts what a forward must read (weights of the experts that were reached, keys and values) and compute, against a plain read
/// of a large buffer and the best matrix product of this program, both read before, between and after the runs. On a GPU each step draws
/// its tokens there, the limits are those of its memory and of cuBLAS, and one more run with clocks tells where the time goes.
///
/// --grpc, --soak and --experiment measure something else instead. Tables go to standard output, progress to standard error.
#[derive(Args, Clone, Debug)]
#[command(group = clap::ArgGroup::new("source").args(["model", "synthetic", "endpoint"]))]
#[command(group = clap::ArgGroup::new("mode").args(["grpc", "soak", "experiment"]))]
pub struct BenchArgs {
    /// Checkpoint folder in Hugging Face layout.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// A shape with random weights: `tiny`, `mixtral-0.9b`, `qwen3-moe-0.9b`, `mixtral-8x7b`, `olmoe-1b-7b`, `qwen3-30b-a3b`, or
    /// key=value,... with the keys layers, hidden, heads, kv-heads, head-dim, experts, expert-width, top-k, vocab, context, shared-width
    /// and qk-norm; what is left out is that of the shape named first, else of tiny: `mixtral-8x7b,layers=8` is as deep as that.
    #[arg(long, value_name = "SPEC")]
    pub synthetic: Option<SyntheticSpec>,
    /// A server that runs already, for --grpc and --soak. Its memory and the model alone are not measured.
    #[arg(long, value_name = "URL", requires = "mode", conflicts_with = "experiment")]
    pub endpoint: Option<String>,
    /// Address of that server's port with /metrics, as 127.0.0.1:9464. Without it the engine's side is not measured.
    #[arg(long, value_name = "HOST:PORT", requires = "endpoint")]
    pub metrics_endpoint: Option<String>,
    /// Where the model runs.
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceKind,
    /// Element type of the large weights.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: WeightType,
    /// Sum every product in an order that does not depend on the batch, as `serve --deterministic` does.
    #[arg(long, conflicts_with = "endpoint")]
    pub deterministic: bool,
    /// Threads that compute. Default: one for each core.
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// Loads of the model alone.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "prefill,decode", conflicts_with = "mode")]
    pub work: Vec<Work>,
    /// Routings: native, top-K, top-K:raw|renorm|unit, soft or soft:TEMPERATURE.
    #[arg(long, value_name = "ROUTING", value_delimiter = ',', default_value = "native")]
    pub routing: Vec<RoutingChoice>,
    /// Lengths of prompts; for a soak the longest, for prefixes the shared part. Default: 512, or half of a shorter context.
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub prompt_tokens: Vec<usize>,
    /// Tokens before the first that is decoded. Default: 0 and the length of the first prompt.
    #[arg(long, value_name = "N", value_delimiter = ',', conflicts_with = "mode")]
    pub context: Vec<usize>,
    /// Sequences at once.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8", conflicts_with_all = ["grpc", "soak"])]
    pub batch: Vec<usize>,
    /// Tokens to generate; for a soak at most. Default: 64, or a quarter of a shorter context.
    #[arg(long, value_name = "N")]
    pub generate: Option<usize>,
    /// Most tokens of one step, as the server's --max-step-tokens.
    #[arg(long, value_name = "N", default_value = "512")]
    pub step_tokens: NonZeroUsize,
    /// Runs of each setting, of which medians are reported.
    #[arg(long, value_name = "N", default_value = "3")]
    pub repeats: NonZeroUsize,
    /// Size of the buffer by which the read bandwidth is measured; it should be larger than the last-level cache. 0 measures no limits.
    #[arg(long, value_name = "MIB", default_value_t = 1024, conflicts_with = "mode")]
    pub limits_mib: usize,
    /// Rows and columns of the matrix product by which the limit of operations is measured. Default: 2048, on a GPU 8192.
    #[arg(long, value_name = "N", conflicts_with = "mode")]
    pub gemm_size: Option<NonZeroUsize>,
    /// Of weights, tokens, lengths and cancellations.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Also write the report to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Measure through gRPC: --clients at once against a server in this process, or at --endpoint; tokens per second, latencies, and what a
    /// decode step costs above that of the model alone.
    #[arg(long)]
    pub grpc: bool,
    /// Load a server for so many seconds with requests of mixed lengths, some of them cancelled or with a deadline; then compare every
    /// stream with a solo run of its prompt, and look for leaks. Exit status 1 if anything is not as it should be.
    #[arg(long, value_name = "SECONDS", value_parser = super::serve::seconds)]
    pub soak: Option<Duration>,
    /// Answer one question: does time per token depend on the number of all experts, is soft routing as dear as its experts, what is a
    /// cached prefix worth, what does watching cost (a full batch of the largest --batch).
    #[arg(long, value_enum)]
    pub experiment: Option<Experiment>,
    /// Concurrent clients. Default: 1, 8 and 16; for a soak 200.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "mode", conflicts_with = "experiment")]
    pub clients: Vec<usize>,
    /// Requests in one batch of the server in this process. Default: the largest number of clients, at most 64; for a soak 16.
    #[arg(long, value_name = "N", requires = "mode", conflicts_with_all = ["endpoint", "experiment"])]
    pub max_batch_requests: Option<NonZeroUsize>,
    /// Size of the cache of that server, in tokens over all requests. Default: a full batch of the longest requests. A small one makes the
    /// engine preempt.
    #[arg(long, value_name = "N", requires = "mode", conflicts_with_all = ["endpoint", "experiment"])]
    pub cache_tokens: Option<NonZeroUsize>,
    /// Distinct prompts of a soak.
    #[arg(long, value_name = "N", default_value = "48", requires = "soak")]
    pub prompts: NonZeroUsize,
    /// How far apart the log-probabilities of two tokens may be, in nats, where a stream differs from its solo run; 0 demands equal streams.
    /// Default: 0 with --deterministic, else 0.001 for f32 and 0.05 for the others.
    #[arg(long, value_name = "NATS", requires = "mode", conflicts_with = "grpc")]
    pub tie_tolerance: Option<f64>,
    /// Tokens per expert in the experiment with numbers of experts.
    #[arg(long, value_name = "N", default_value = "64", requires = "experiment")]
    pub rows_per_expert: NonZeroUsize,
}

/// How long prompts and continuations are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lengths {
    prompts: Vec<usize>,
    contexts: Vec<usize>,
    generate: usize,
}

/// Measures and prints. Fails after that where a soak or an experiment found something wrong.
pub fn run(args: BenchArgs) -> Result<()> {
    start_compute_threads(args.threads)?;
    let report = args.measure()?;
    println!("{report}");
    if let Some(path) = &args.json {
        report.write_json(path)?;
    }
    let violations = report.violations();
    match violations.first() {
        None => Ok(()),
        Some(first) => Err(Error::FailedPrecondition(format!("{} violations, the first: {first}", violations.len()))),
    }
}

impl BenchArgs {
    fn measure(&self) -> Result<Report> {
        if self.grpc {
            let clients = if self.clients.is_empty() { DEFAULT_CLIENTS.to_vec() } else { self.clients.clone() };
            let batch = clients.iter().copied().max().unwrap_or(1).min(MOST_DEFAULT_BATCH);
            let (place, lengths) = self.place(batch)?;
            return bench::run_grpc(&place, &self.grpc_config(clients, lengths));
        }
        if let Some(duration) = self.soak {
            let (place, lengths) = self.place(DEFAULT_SOAK_BATCH)?;
            return bench::run_soak(&place, &self.soak_config(duration, lengths, place.dtype())?);
        }
        match self.experiment {
            None => {
                let source =
                    self.source().ok_or_else(|| Error::invalid("--model", "name a checkpoint folder, or a shape with --synthetic"))?;
                let subject = self.load(&source)?;
                bench::run_steps(&subject, &self.steps_config(&subject.spec), self.limits(&subject))
            }
            Some(Experiment::Experts) => {
                let base = match self.source() {
                    Some(Source::Synthetic(spec)) => spec,
                    Some(Source::Folder(_)) => {
                        return Err(Error::invalid("--model", "models that differ in their number of experts are made: use --synthetic"));
                    }
                    None => EXPERTS_BASE.parse()?,
                };
                bench::run_experts(&base, self.placement(), &self.experiment_config(self.lengths(base.context), "f32")?)
            }
            Some(Experiment::Soft) => {
                let (subject, config) = self.experiment_subject()?;
                bench::run_soft(&subject, &config)
            }
            Some(Experiment::Prefix) => {
                let (subject, config) = self.experiment_subject()?;
                let limits = self.server_limits(1, subject.spec.max_context);
                bench::run_prefix(&subject, limits, &config)
            }
            Some(Experiment::Overhead) => {
                let [routing] = self.routing[..] else {
                    return Err(Error::invalid("--routing", "this experiment has one routing"));
                };
                let (subject, config) = self.experiment_subject()?;
                bench::run_overhead(&subject, routing, &config)
            }
        }
    }

    fn source(&self) -> Option<Source> {
        let folder = self.model.clone().map(Source::Folder);
        folder.or_else(|| self.synthetic.clone().map(Source::Synthetic))
    }

    fn limits(&self, subject: &Subject) -> Option<LimitConfig> {
        let default = if subject.device == DeviceKind::Cpu { DEFAULT_GEMM.0 } else { DEFAULT_GEMM.1 };
        let (buffer_bytes, gemm_size) = (self.limits_mib.saturating_mul(1 << 20), self.gemm_size.map_or(default, NonZeroUsize::get));
        (buffer_bytes > 0).then_some(LimitConfig {
            device: subject.device,
            buffer_bytes,
            gemm_size,
            dtype: if subject.dtype == "f32" { DType::F32 } else { DType::BF16 },
        })
    }

    fn placement(&self) -> Placement {
        let reduction = if self.deterministic { Reduction::BatchInvariant } else { Reduction::Fastest };
        Placement { device: self.device, weights: self.dtype, reduction, seed: self.seed }
    }

    fn load(&self, source: &Source) -> Result<Subject> {
        Subject::load(source, self.placement())
    }

    /// The server to load, with lengths that it can do.
    fn place(&self, batch: usize) -> Result<(Place, Lengths)> {
        if let Some(url) = &self.endpoint {
            let place = Place::elsewhere(Target::elsewhere(url, self.metrics_endpoint.clone()))?;
            let lengths = self.lengths(place.max_context());
            return Ok((place, lengths));
        }
        let source = self
            .source()
            .ok_or_else(|| Error::invalid("--model", "name a checkpoint folder, a shape with --synthetic, or an --endpoint"))?;
        let subject = self.load(&source)?;
        let lengths = self.lengths(subject.spec.max_context);
        let longest = lengths.prompts.iter().copied().max().unwrap_or(0) + lengths.generate;
        let limits = self.server_limits(batch, longest);
        Ok((Place::Here { subject, limits }, lengths))
    }

    fn lengths(&self, max_context: usize) -> Lengths {
        let given = |list: &[usize], default: Vec<usize>| if list.is_empty() { default } else { list.to_vec() };
        let prompts = given(&self.prompt_tokens, vec![DEFAULT_PROMPT.min(max_context / 2).max(1)]);
        let context = prompts.first().copied().unwrap_or(0);
        let generate = self.generate.unwrap_or_else(|| DEFAULT_GENERATE.min(max_context / 4).max(1));
        Lengths { contexts: given(&self.context, vec![0, context]), prompts, generate }
    }

    fn steps_config(&self, spec: &ModelSpec) -> StepsConfig {
        let Lengths { prompts, contexts, generate } = self.lengths(spec.max_context);
        StepsConfig {
            works: self.work.clone(),
            routings: self.routing.clone(),
            batches: self.batch.clone(),
            prompt_tokens: prompts,
            contexts,
            generate,
            step_tokens: self.step_tokens.get(),
            repeats: self.repeats.get(),
            seed: self.seed,
        }
    }

    fn grpc_config(&self, clients: Vec<usize>, lengths: Lengths) -> GrpcConfig {
        GrpcConfig {
            clients,
            prompt_tokens: lengths.prompts,
            generate: lengths.generate,
            routings: self.routing.clone(),
            repeats: self.repeats.get(),
            step_tokens: self.step_tokens.get(),
            seed: self.seed,
        }
    }

    fn soak_config(&self, duration: Duration, lengths: Lengths, dtype: &str) -> Result<SoakConfig> {
        let clients = match self.clients.as_slice() {
            [] => DEFAULT_SOAK_CLIENTS,
            [clients] => *clients,
            _ => return Err(Error::invalid("--clients", "a soak has one number of clients")),
        };
        Ok(SoakConfig {
            duration,
            clients,
            prompts: self.prompts.get(),
            prompt_tokens: lengths.prompts.iter().copied().max().unwrap_or(0),
            generate: lengths.generate,
            routings: self.routing.clone(),
            tie_tolerance: self.tolerance(dtype),
            seed: self.seed,
        })
    }

    fn experiment_subject(&self) -> Result<(Subject, ExperimentConfig)> {
        let source = match self.source() {
            Some(source) => source,
            None => Source::Synthetic(EXPERIMENT_MODEL.parse()?),
        };
        let subject = self.load(&source)?;
        let config = self.experiment_config(self.lengths(subject.spec.max_context), subject.dtype)?;
        Ok((subject, config))
    }

    fn experiment_config(&self, lengths: Lengths, dtype: &str) -> Result<ExperimentConfig> {
        let [prompt_tokens] = lengths.prompts[..] else {
            return Err(Error::invalid("--prompt-tokens", "an experiment has one length of prompts"));
        };
        Ok(ExperimentConfig {
            repeats: self.repeats.get(),
            rows_per_expert: self.rows_per_expert.get(),
            prompt_tokens,
            batches: self.batch.clone(),
            generate: lengths.generate,
            tie_tolerance: self.tolerance(dtype),
            seed: self.seed,
        })
    }

    /// Differences that rounding explains.
    fn tolerance(&self, dtype: &str) -> f64 {
        self.tie_tolerance.unwrap_or(match dtype {
            _ if self.deterministic => 0.0,
            "f32" => 0.001,
            _ => 0.05,
        })
    }

    /// Limits of the server in this process, for requests of at most `longest` tokens.
    fn server_limits(&self, batch: usize, longest: usize) -> ServerLimits {
        let max_batch_requests = self.max_batch_requests.map_or(batch, NonZeroUsize::get);
        ServerLimits {
            max_batch_requests,
            max_queue_requests: self.clients.iter().copied().max().unwrap_or(0).max(DEFAULT_SOAK_CLIENTS),
            step_tokens: self.step_tokens.get(),
            max_new_tokens: longest.max(1),
            cache: self.cache_tokens.map_or_else(|| cache_for(max_batch_requests, longest), |tokens| cache_for(1, tokens.get())),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(flags: &str) -> Result<BenchArgs, clap::Error> {
        Line::try_parse_from(std::iter::once("bench").chain(flags.split_whitespace())).map(|line| line.bench)
    }

    #[test]
    fn lengths_fit_the_context_unless_given() {
        let args = parse("--synthetic tiny").unwrap();
        assert_eq!(args.lengths(4096), Lengths { prompts: vec![512], contexts: vec![0, 512], generate: 64 });
        assert_eq!(args.lengths(100), Lengths { prompts: vec![50], contexts: vec![0, 50], generate: 25 });
        let args = parse("--synthetic tiny --prompt-tokens 7,9 --context 3 --generate 1").unwrap();
        assert_eq!(args.lengths(4), Lengths { prompts: vec![7, 9], contexts: vec![3], generate: 1 });
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for flags in [
            "--model a --synthetic tiny",
            "--grpc --soak 1",
            "--endpoint a:1",
            "--endpoint a:1 --experiment prefix",
            "--metrics-endpoint a:1 --grpc",
            "--clients 2",
            "--soak 1 --work decode",
            "--grpc --limits-mib 1",
            "--synthetic big",
            "--routing hard",
            "--repeats 0",
        ] {
            assert!(parse(flags).is_err(), "{flags}");
        }
        assert!(parse("--soak 1 --endpoint a:1 --metrics-endpoint a:2 --clients 3 --tie-tolerance 0").is_ok());
    }

    #[test]
    fn a_soak_has_one_number_of_clients() {
        let args = parse("--soak 1 --clients 1,2").unwrap();
        assert!(args.soak_config(Duration::ZERO, args.lengths(100), "f32").is_err());
        let config = parse("--soak 1").unwrap().soak_config(Duration::ZERO, args.lengths(100), "bf16").unwrap();
        assert_eq!((config.clients, config.tie_tolerance), (200, 0.05));
        let exact = parse("--soak 1 --deterministic").unwrap().soak_config(Duration::ZERO, args.lengths(100), "bf16").unwrap();
        assert_eq!(exact.tie_tolerance, 0.0);
    }

    #[test]
    fn a_cache_can_be_too_small_for_all() {
        let limits = parse("--grpc").unwrap().server_limits(4, 33);
        assert_eq!((limits.cache.num_blocks, limits.max_batch_requests), (12, 4));
        assert_eq!(parse("--grpc --cache-tokens 64").unwrap().server_limits(4, 33).cache.num_blocks, 4);
    }
}
