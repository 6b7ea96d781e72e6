//! `hardmax bench`: how fast is a model here, what does serving add, and how near is it to what the machine can do.
//!
//! A [`Subject`] is a folder or a shape with random weights. [`steps`] drives it without a server, [`grpc`] through a real one, [`soak`]
//! for a long time and with bad manners, [`experiment`] to answer one question each, [`overhead`] another. [`limits`] are read between the runs, since a shared
//! machine is not the same from minute to minute; for that reason results are medians, and ratios of neighbours in time. [`cost`] says
//! what a forward has to read and to compute. A [`Report`] has it all.

pub mod client;
pub mod cost;
pub mod cpu_time;
pub mod experiment;
#[cfg(feature = "gpu")]
mod gpu;
pub mod grpc;
pub mod limits;
pub mod micro;
pub mod overhead;
pub mod report;
pub mod soak;
pub mod stats;
pub mod steps;
pub mod subject;
pub mod synthetic;
mod table;
pub mod target;
pub mod verify;

use self::{
    experiment::ExperimentConfig,
    grpc::GrpcConfig,
    limits::{LimitConfig, Limits},
    soak::SoakConfig,
    steps::StepsConfig,
    synthetic::SyntheticSpec,
    target::{Facts, LocalServer, ServerLimits, Target},
};
pub use self::{
    report::Report,
    subject::{Placement, Source, Subject},
};
use crate::{
    error::{Error, Result},
    model::load::DeviceKind,
    moe::policy::RoutingChoice,
};

/// The server to load.
#[derive(Debug)]
pub enum Place {
    /// One in this process.
    Here {
        /// Its model.
        subject: Subject,
        /// Its limits.
        limits: ServerLimits,
    },
    /// One that runs already.
    Elsewhere {
        /// Where it is.
        target: Target,
        /// What it says about itself.
        facts: Facts,
    },
}

/// Model-level runs, with or without readings of the limits around them.
pub fn run_steps(subject: &Subject, config: &StepsConfig, limits: Option<LimitConfig>) -> Result<Report> {
    config.check(&subject.spec)?;
    let mut report = Report::new();
    report.subject(subject);
    let mut limits = limits.map(Limits::new).transpose()?;
    report.steps = steps::measure(subject, config, limits.as_mut())?;
    if let Some(limits) = &limits {
        report.limits(limits);
    }
    Ok(report)
}

/// Runs through gRPC.
pub fn run_grpc(place: &Place, config: &GrpcConfig) -> Result<Report> {
    place.visit(|target, subject, mut report| {
        report.grpc = block_on(grpc::measure(target, subject, config))?;
        Ok(report)
    })
}

/// A soak. What it found wrong is in [`Report::violations`].
pub fn run_soak(place: &Place, config: &SoakConfig) -> Result<Report> {
    place.visit(|target, subject, mut report| {
        report.soak = Some(block_on(soak::soak(target, config, subject.is_some()))?);
        Ok(report)
    })
}

/// The experiment with numbers of experts.
pub fn run_experts(base: &SyntheticSpec, placement: Placement, config: &ExperimentConfig) -> Result<Report> {
    needs_clocks(placement.device)?;
    let mut report = Report::new();
    report.experts = Some(experiment::experts(base, placement, config)?);
    Ok(report)
}

/// The experiment with soft routing.
pub fn run_soft(subject: &Subject, config: &ExperimentConfig) -> Result<Report> {
    needs_clocks(subject.device)?;
    let mut report = Report::new();
    report.subject(subject);
    report.soft = experiment::soft(subject, config)?;
    Ok(report)
}

/// The experiment with a shared prefix.
pub fn run_prefix(subject: &Subject, limits: ServerLimits, config: &ExperimentConfig) -> Result<Report> {
    let mut report = Report::new();
    report.subject(subject);
    let (warm, cold) = (LocalServer::start(subject, limits)?, LocalServer::start(subject, limits)?);
    report.prefix = Some(block_on(experiment::prefix(warm.target(), cold.target(), config))?);
    warm.stop()?;
    cold.stop()?;
    Ok(report)
}

/// The experiment with what watching costs, under `routing`.
pub fn run_overhead(subject: &Subject, routing: RoutingChoice, config: &ExperimentConfig) -> Result<Report> {
    let mut report = Report::new();
    report.subject(subject);
    report.overhead = Some(block_on(overhead::measure(subject, routing, config))?);
    Ok(report)
}

/// Fails where the clocks of the host do not tell what experts take.
fn needs_clocks(device: DeviceKind) -> Result<()> {
    if device == DeviceKind::Cpu {
        return Ok(());
    }
    let message = "this experiment compares times in experts by the clocks of the host: use --device cpu, or read the kinds of kernels that a run without \
                   --experiment reports";
    Err(Error::invalid("--device", message))
}

impl Place {
    /// A server elsewhere, asked for what it is.
    pub fn elsewhere(target: Target) -> Result<Self> {
        let facts = block_on(target.facts())?;
        Ok(Self::Elsewhere { target, facts })
    }

    /// Longest sequence, in tokens.
    pub fn max_context(&self) -> usize {
        match self {
            Self::Here { subject, .. } => subject.spec.max_context,
            Self::Elsewhere { facts, .. } => facts.max_context,
        }
    }

    /// Element type of the large weights, as reports have it.
    pub fn dtype(&self) -> &str {
        match self {
            Self::Here { subject, .. } => subject.dtype,
            Self::Elsewhere { facts, .. } => &facts.dtype,
        }
    }

    /// Works with the server, started for it if it is here and stopped after it.
    fn visit(&self, work: impl FnOnce(&Target, Option<&Subject>, Report) -> Result<Report>) -> Result<Report> {
        let mut report = Report::new();
        match self {
            Self::Here { subject, limits } => {
                report.subject(subject);
                let server = LocalServer::start(subject, *limits)?;
                let report = work(server.target(), Some(subject), report)?;
                server.stop()?;
                Ok(report)
            }
            Self::Elsewhere { target, facts } => {
                report.facts(facts.clone());
                work(target, None, report)
            }
        }
    }
}

/// Clients live on this thread.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::Internal(format!("no runtime: {error}")))?.block_on(work)
}
