//! The result of a run, as tables for people and as JSON for machines.

use std::{fmt, fs, path::Path};

use serde::Serialize;

#[cfg(feature = "gpu")]
use super::gpu::GpuFacts;
use super::{
    cost::ElementSizes,
    experiment::{ExpertsReport, PrefixReport, SoftRow},
    grpc::GrpcMeasurement,
    limits::{Limits, Readings, last_level_cache},
    overhead::{Difference, OverheadReport},
    soak::SoakReport,
    stats::Latency,
    steps::{Measurement, Work},
    subject::Subject,
    table::{Table, milliseconds, number, percent},
    target::Facts,
};
use crate::{
    error::{Error, Result},
    ops::cpu::Isa,
};

/// Of the JSON; a change that breaks readers makes a new number.
const FORMAT: u32 = 1;

/// Everything that a run found. Parts that were not asked for are absent.
#[derive(Debug, Serialize)]
pub struct Report {
    format: u32,
    version: &'static str,
    git: &'static str,
    machine: Machine,
    #[cfg(feature = "gpu")]
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<GpuFacts>,
    model: Option<ModelFacts>,
    limits: Option<LimitFacts>,
    /// Model-level runs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Measurement>,
    /// Runs through gRPC.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub grpc: Vec<GrpcMeasurement>,
    /// A soak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soak: Option<SoakReport>,
    /// The experiment with numbers of experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertsReport>,
    /// The experiment with soft routing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub soft: Vec<SoftRow>,
    /// The experiment with a shared prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<PrefixReport>,
    /// The experiment with what watching costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead: Option<OverheadReport>,
}

#[derive(Debug, Serialize)]
struct Machine {
    cpu: String,
    cores: usize,
    threads: usize,
    instruction_set: String,
    last_level_cache_bytes: Option<usize>,
    /// Of one, five and fifteen minutes, at the start.
    load_average: Option<[f64; 3]>,
}

#[derive(Debug, Serialize)]
struct ModelFacts {
    name: String,
    family: Option<String>,
    dtype: String,
    parameters: Option<u64>,
    active_parameters: Option<u64>,
    element_bytes: Option<ElementSizes>,
}

#[derive(Debug, Serialize)]
struct LimitFacts {
    buffer_bytes: usize,
    gemm_size: usize,
    routine: &'static str,
    bandwidth: f64,
    flops: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    copy_bandwidth: Option<f64>,
    readings: Readings,
}

impl Report {
    /// An empty report about this machine.
    pub fn new() -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION"),
            git: env!("HARDMAX_GIT"),
            machine: Machine {
                cpu: cpu_name(),
                cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
                threads: rayon::current_num_threads(),
                instruction_set: format!("{:?}", Isa::detect()),
                last_level_cache_bytes: last_level_cache(),
                load_average: load_average(),
            },
            #[cfg(feature = "gpu")]
            gpu: None,
            model: None,
            limits: None,
            steps: Vec::new(),
            grpc: Vec::new(),
            soak: None,
            experts: None,
            soft: Vec::new(),
            prefix: None,
            overhead: None,
        }
    }

    /// What is measured.
    pub fn subject(&mut self, subject: &Subject) {
        #[cfg(feature = "gpu")]
        if subject.device == crate::model::load::DeviceKind::Cuda {
            // There is a model on it.
            self.gpu = GpuFacts::read().ok();
        }
        let (parameters, active) = subject.spec.parameters();
        self.model = Some(ModelFacts {
            name: subject.name.clone(),
            family: Some(subject.spec.family.clone()),
            dtype: subject.dtype.to_owned(),
            parameters: Some(parameters),
            active_parameters: Some(active),
            element_bytes: Some(subject.sizes),
        });
    }

    /// What is measured, of a server elsewhere.
    pub fn facts(&mut self, facts: Facts) {
        let (name, dtype) = (facts.model, facts.dtype);
        self.model = Some(ModelFacts { name, dtype, family: None, parameters: None, active_parameters: None, element_bytes: None });
    }

    /// All readings of the limits.
    pub fn limits(&mut self, limits: &Limits) {
        let (buffer_bytes, gemm_size) = limits.sizes();
        let (readings, limit) = (limits.readings().clone(), limits.readings().limit());
        self.limits = Some(LimitFacts {
            buffer_bytes,
            gemm_size,
            routine: limits.routine(),
            bandwidth: limit.bandwidth,
            flops: limit.flops,
            copy_bandwidth: readings.copy_bandwidth.median(),
            readings,
        });
    }

    /// Writes the report as JSON.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::Internal(format!("the report as JSON: {error}")))?;
        fs::write(path, text + "\n").map_err(|error| Error::io(path, error))
    }

    /// What should not be, in words; nothing if all is well.
    pub fn violations(&self) -> Vec<String> {
        let mut violations = self.soak.as_ref().map(|soak| soak.violations.clone()).unwrap_or_default();
        if let Some(prefix) = self.prefix.as_ref().filter(|prefix| prefix.different > 0) {
            violations.push(format!("{} outputs after a cached prefix differ", prefix.different));
        }
        violations
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(f, "{}, {} cores, {} threads, {}", machine.cpu, machine.cores, machine.threads, machine.instruction_set)?;
        #[cfg(feature = "gpu")]
        if let Some(gpu) = &self.gpu {
            writeln!(f, "{gpu}")?;
        }
        if let Some(model) = &self.model {
            write!(f, "{}, {}", model.name, model.dtype)?;
            if let (Some(all), Some(active)) = (model.parameters, model.active_parameters) {
                write!(f, ", {:.0} M parameters, {:.0} M active", all as f64 / 1e6, active as f64 / 1e6)?;
            }
            writeln!(f)?;
        }
        if let Some(limits) = &self.limits {
            let (gigabytes, gigaflops) = (number(limits.bandwidth / 1e9), number(limits.flops / 1e9));
            let mib = limits.buffer_bytes >> 20;
            let count = limits.readings.bandwidth.values().len();
            writeln!(
                f,
                "limits, medians of {count} readings: {gigabytes} GB/s read from {mib} MiB, {gigaflops} GFLOP/s by {} of {} × {}",
                limits.routine, limits.gemm_size, limits.gemm_size
            )?;
            if let Some(copied) = limits.copy_bandwidth {
                writeln!(f, "copied, both directions counted: {} GB/s", number(copied / 1e9))?;
            }
        }
        writeln!(f)?;
        self.write_steps(f)?;
        self.write_classes(f)?;
        self.write_grpc(f)?;
        self.write_experiments(f)?;
        self.soak.as_ref().map_or(Ok(()), |soak| write_soak(f, soak))
    }
}

impl Report {
    fn write_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.steps.is_empty() {
            return Ok(());
        }
        let columns = [
            "work",
            "routing",
            "batch",
            "prompt",
            "context",
            "tok/s",
            "prefill tok/s",
            "decode tok/s",
            "step p50 ms",
            "p99 ms",
            "MB/tok",
            "GFLOP/tok",
            "experts/layer",
            "of read",
            "of GEMM",
            "of roofline",
            "in attention",
            "in experts",
        ];
        let mut table = Table::new("Model, without a server. Rates are medians over runs.", &columns);
        for m in &self.steps {
            let length = |shown: bool, tokens: usize| if shown { tokens.to_string() } else { "-".into() };
            let mixed = m.setting.work == Work::Mixed;
            table.row([
                m.setting.work.to_string(),
                m.setting.routing.to_string(),
                m.setting.batch.to_string(),
                length(m.setting.work != Work::Decode, m.setting.prompt_tokens),
                length(m.setting.work != Work::Prefill, m.setting.context),
                number(m.tokens_per_second),
                number(mixed.then_some(m.prefill_tokens_per_second)),
                number(mixed.then_some(m.decode_tokens_per_second)),
                milliseconds(m.step_seconds.p50),
                milliseconds(m.step_seconds.p99),
                number(m.bytes_per_token / 1e6),
                number(m.flops_per_token / 1e9),
                number(m.experts_per_layer),
                percent(m.bandwidth_share),
                percent(m.flops_share),
                percent(m.roofline_share),
                percent(m.attention_share),
                percent(m.experts_share),
            ]);
        }
        writeln!(f, "{table}")
    }

    /// Where the time goes on a GPU, with a column for each kind of kernels that ran.
    fn write_classes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut classes: Vec<&str> = Vec::new();
        for time in self.steps.iter().flat_map(|m| &m.classes) {
            if !classes.contains(&time.class) {
                classes.push(time.class);
            }
        }
        if classes.is_empty() {
            return Ok(());
        }
        let columns: Vec<&str> = ["setting", "all"].into_iter().chain(classes.iter().copied()).collect();
        let title = "Milliseconds of a step by kinds of kernels, in a run of its own with clocks between them: without, steps that decode are one launch.";
        let mut table = Table::new(title, &columns);
        for m in &self.steps {
            let all: f64 = m.classes.iter().map(|time| time.milliseconds).sum();
            let of = |class: &&str| number(m.classes.iter().find(|time| time.class == *class).map(|time| time.milliseconds));
            table.row([m.setting.to_string(), number(all)].into_iter().chain(classes.iter().map(of)));
        }
        writeln!(f, "{table}")
    }

    fn write_grpc(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.grpc.is_empty() {
            return Ok(());
        }
        let columns =
            ["routing", "clients", "prompt", "generate", "tok/s", "first token ms p50", "p90", "p99", "next token ms p50", "p90", "p99"];
        let mut table = Table::new("Through gRPC.", &columns);
        let latency = |l: &Latency| [l.p50, l.p90, l.p99].map(milliseconds);
        for m in &self.grpc {
            let head = [
                m.routing.clone(),
                m.clients.to_string(),
                m.prompt_tokens.to_string(),
                m.generate.to_string(),
                number(m.tokens_per_second),
            ];
            table.row(head.into_iter().chain(latency(&m.time_to_first_token)).chain(latency(&m.inter_token)));
        }
        writeln!(f, "{table}")?;
        let columns = ["routing", "clients", "", "client ms", "engine forward ms", "model alone ms", "over engine", "over model"];
        let title = "A decode step with all clients in it: as clients see it, its forward inside the engine, and the same tokens on the model \
                     alone. Shares are medians over bursts, each against its own replay.";
        let mut times = Table::new(title, &columns);
        let columns =
            ["routing", "clients", "compute ms", "waiting ms", "engine ms", "sockets ms", "clients ms", "engine and sockets / compute"];
        let title = "CPU time of that step, all threads of a kind together; waiting is what those that compute spent without a core.";
        let mut cpu = Table::new(title, &columns);
        let (mut any, mut any_cpu) = (false, false);
        for m in &self.grpc {
            let Some(steps) = m.steps else { continue };
            any = true;
            let head = || [m.routing.clone(), m.clients.to_string()];
            let row =
                |kind: &str, client: f64, engine: Option<f64>, model: Option<f64>, over_engine: Option<f64>, over_model: Option<f64>| {
                    let times = [milliseconds(client), milliseconds(engine), milliseconds(model)];
                    head().into_iter().chain([kind.to_owned()]).chain(times).chain([percent(over_engine), percent(over_model)])
                };
            let (model, over) = (steps.model, steps.overhead);
            times.row(row("median", steps.client.median, None, model.map(|m| m.median), None, over.map(|o| o.median)));
            times.row(row("mean", steps.client.mean, steps.engine, model.map(|m| m.mean), steps.overhead_in_engine, over.map(|o| o.mean)));
            if let Some(step) = steps.cpu {
                any_cpu = true;
                let parts = [step.compute, step.compute_waited, step.engine, step.io, step.clients];
                cpu.row(head().into_iter().chain(parts.map(milliseconds)).chain([percent(step.serving_share())]));
            }
        }
        if any {
            writeln!(f, "{times}")?;
        }
        if any_cpu {
            writeln!(f, "{cpu}")?;
        }
        Ok(())
    }

    fn write_experiments(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(report) = &self.experts {
            writeln!(f, "{}, {}\n", report.shape, report.dtype)?;
            let columns = ["experts", "tokens", "us/token", "us/token in experts", "largest load / mean", "against the fewest"];
            let mut table =
                Table::new("Cost per token against the number of experts: top-1, experts of one size, equal rows per expert.", &columns);
            for row in &report.rows {
                table.row([
                    row.experts.to_string(),
                    row.tokens.to_string(),
                    number(row.seconds_per_token * 1e6),
                    number(row.experts_seconds_per_token * 1e6),
                    number(row.imbalance),
                    percent(row.relative),
                ]);
            }
            writeln!(f, "{table}")?;
        }
        if !self.soft.is_empty() {
            let columns = ["work", "tokens per step", "native us/token", "soft us/token", "E/k", "soft / (E/k native)"];
            let mut table = Table::new("Time in experts under soft routing.", &columns);
            for row in &self.soft {
                table.row([
                    row.work.to_owned(),
                    row.tokens.to_string(),
                    number(row.native_seconds_per_token * 1e6),
                    number(row.soft_seconds_per_token * 1e6),
                    number(row.experts_over_k),
                    percent(row.relative),
                ]);
            }
            writeln!(f, "{table}")?;
        }
        if let Some(prefix) = &self.prefix {
            writeln!(
                f,
                "A shared prefix of {} tokens: first token after {} ms, for the second request after {} ms, {}. Outputs: {} equal, {} after a near \
                 tie, {} different.\n",
                prefix.prefix_tokens,
                milliseconds(prefix.first),
                milliseconds(prefix.second),
                percent(prefix.relative),
                prefix.equal,
                prefix.near_ties,
                prefix.different
            )?;
        }
        self.overhead.as_ref().map_or(Ok(()), |overhead| write_overhead(f, overhead))
    }
}

fn write_overhead(f: &mut fmt::Formatter<'_>, report: &OverheadReport) -> fmt::Result {
    let title = format!(
        "What watching costs: {} requests at once under {}, prompts of {} tokens, {} generated; all of {} turns.",
        report.clients, report.routing, report.prompt_tokens, report.generate, report.turns
    );
    let mut table = Table::new(title, &["watched", "tok/s", "time", "95 of 100", "CPU time", "95 of 100", "samples", "dropped"]);
    let signed = |share: f64| format!("{:+.1} %", share * 100.0);
    let interval = |difference: Difference| difference.interval.map(signed).join(" to ");
    for row in &report.rows {
        table.row([
            row.arm.to_owned(),
            number(row.tokens_per_second),
            signed(row.time.share),
            interval(row.time),
            row.cpu.map_or_else(|| "-".into(), |cpu| signed(cpu.share)),
            row.cpu.map_or_else(|| "-".into(), interval),
            row.samples.to_string(),
            row.dropped.to_string(),
        ]);
    }
    writeln!(f, "{table}")?;
    let mut table = Table::new("What the parts take, by clocks of their own.", &["part", "each time", "times a second", "of the time"]);
    for part in &report.parts {
        let micros = format!("{} µs", number(part.seconds * 1e6));
        table.row([part.name.to_owned(), micros, number(part.per_second), format!("{:.3} %", part.share() * 100.0)]);
    }
    writeln!(f, "{table}")
}

fn write_soak(f: &mut fmt::Formatter<'_>, soak: &SoakReport) -> fmt::Result {
    let mut table = Table::new(format!("Soak: {} clients for {} s.", soak.clients, number(soak.seconds)), &["what", "value"]);
    let mut row = |what: &str, value: String| table.row([what.to_owned(), value]);
    for (end, count) in &soak.ends {
        row(&format!("requests {end}"), count.to_string());
    }
    row("tokens/s", number(soak.tokens_per_second));
    row(
        "first token ms p50, p99",
        format!("{}, {}", milliseconds(soak.time_to_first_token.p50), milliseconds(soak.time_to_first_token.p99)),
    );
    row("next token ms p50, p99", format!("{}, {}", milliseconds(soak.inter_token.p50), milliseconds(soak.inter_token.p99)));
    row("streams compared with solo runs", format!("{}, {} of them finished", soak.compared, soak.compared_finished));
    row("equal, near ties, different", format!("{}, {}, {}", soak.equal, soak.near_ties, soak.different));
    row("largest gap at a difference, nats", number(soak.largest_gap));
    if let (Some(first), Some(last)) = (soak.resident_bytes.first(), soak.resident_bytes.last()) {
        row("resident MB at start and end", format!("{}, {}", first / 1_000_000, last / 1_000_000));
        row("growth after warm-up, MB", number(soak.resident_growth.map(|bytes| bytes / 1e6)));
    }
    for (name, value) in &soak.server {
        row(name, value.to_string());
    }
    writeln!(f, "{table}")?;
    soak.violations.iter().try_for_each(|violation| writeln!(f, "VIOLATED: {violation}"))
}

fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")).and_then(|rest| rest.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn load_average() -> Option<[f64; 3]> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let values: Vec<f64> = text.split_whitespace().take(3).map(str::parse).collect::<std::result::Result<_, _>>().ok()?;
    values.try_into().ok()
}
