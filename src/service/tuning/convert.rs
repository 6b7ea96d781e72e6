//! From what is known of jobs and generations to messages.

use super::config::{share_message, tuning_message};
use crate::{
    jobs::{Entry, GenerationRecord, Job, JobPhase, JobState, Published, What},
    model::ModelSpec,
    moe::policy::RoutingRule,
    service::{
        convert::{routing_message, saturate},
        proto,
    },
    tune::{
        evaluate::{Figures, RoutingFigures},
        gates::Verdict,
        memory::MemoryPlan,
        tuner::{Event, Step},
    },
};

/// Turns records into messages; knows which decoder layers have experts.
#[derive(Clone, Debug)]
pub(super) struct Scribe {
    layers: Vec<usize>,
}

// === impl Scribe ===

impl Scribe {
    pub(super) fn new(spec: &ModelSpec) -> Self {
        Self { layers: spec.moe_layers().map(|(layer, _)| layer).collect() }
    }

    /// For a model with experts in these decoder layers.
    #[cfg(test)]
    pub(super) fn of(layers: Vec<usize>) -> Self {
        Self { layers }
    }

    pub(super) fn job(&self, job: &Job) -> proto::TuningJob {
        proto::TuningJob {
            id: job.id.to_string(),
            state: state(job.state).into(),
            phase: job.phase.map_or(proto::TuningPhase::Unspecified, phase).into(),
            detail: job.detail.clone(),
            config: Some(tuning_message(&job.config)),
            share: Some(share_message(job.share)),
            base_generation: job.base_generation,
            generation: job.generation.unwrap_or(0),
            created: job.created,
            step: saturate(job.step),
            steps: saturate(job.steps),
            skipped_steps: saturate(job.skipped),
            train_tokens: job.train_tokens,
            heldout_tokens: job.heldout_tokens,
            data_sha256: job.data_sha256.clone(),
            memory: Some(memory(&job.memory)),
            before: job.before.as_ref().map(|figures| self.figures(figures)),
            latest: job.latest.as_ref().map(|figures| self.figures(figures)),
            verdicts: verdicts(&job.verdicts),
            trained: job.trained.clone(),
            trained_parameters: job.trained_parameters,
            eta_seconds: job.eta_seconds.unwrap_or(0.0),
        }
    }

    pub(super) fn figures(&self, figures: &Figures) -> proto::TuningFigures {
        proto::TuningFigures {
            tokens: figures.tokens,
            reference_perplexity: figures.reference_perplexity,
            routings: figures.routings.iter().map(|routing| self.routed(routing)).collect(),
        }
    }

    fn routed(&self, figures: &RoutingFigures) -> proto::tuning_figures::Routed {
        let RoutingFigures { routing, k, perplexity, kl, teacher_kl, top1_agree, utilization, dead } = figures;
        let layers = self.layers.iter().zip(utilization).zip(dead);
        proto::tuning_figures::Routed {
            routing: routing.parse::<RoutingRule>().ok().map(|rule| routing_message(&rule)),
            top_k: k.map(saturate),
            perplexity: *perplexity,
            kl: *kl,
            teacher_kl: *teacher_kl,
            top1_agree: *top1_agree,
            layers: layers
                .map(|((layer, utilization), dead)| proto::tuning_figures::Layer {
                    layer: saturate(*layer),
                    utilization: utilization.clone(),
                    dead_experts: saturate(*dead),
                })
                .collect(),
        }
    }

    /// `None` for what is of no interest to anybody outside.
    pub(super) fn entry(&self, entry: &Entry, share: f64) -> Option<proto::WatchTuningResponse> {
        use proto::watch_tuning_response::{Evaluation, Event as Told};
        let event = match &entry.what {
            What::Job(job) => Told::Job(self.job(job)),
            What::Event(Event::Step(event)) => Told::Step(step(event, share)),
            What::Event(Event::Evaluation { step, figures }) => {
                Told::Evaluation(Evaluation { step: saturate(*step), figures: Some(self.figures(figures)) })
            }
            What::Event(_) => return None,
        };
        Some(proto::WatchTuningResponse { sequence: entry.sequence, history: entry.history, event: Some(event) })
    }

    pub(super) fn generation(&self, record: &GenerationRecord) -> proto::Generation {
        proto::Generation {
            number: record.number,
            current: record.current,
            resident: record.resident,
            parent: record.parent.unwrap_or(0),
            job: record.job.map(|job| job.to_string()).unwrap_or_default(),
            published: record.published,
            tensors: saturate(record.tensors),
            bytes: record.bytes,
            figures: record.figures.as_ref().map(|figures| self.figures(figures)),
            requests: record.requests,
        }
    }
}

pub(super) fn published(published: &Published) -> proto::PublishResponse {
    proto::PublishResponse {
        generation: published.generation,
        previous: published.previous,
        verdicts: verdicts(&published.verdicts),
        staying: saturate(published.staying),
        migrated: saturate(published.migrated),
        seconds: published.seconds,
    }
}

fn verdicts(verdicts: &[Verdict]) -> Vec<proto::TuningVerdict> {
    let message = |verdict: &Verdict| {
        let Verdict { gate, passed, current, candidate, limit } = verdict;
        proto::TuningVerdict { gate: gate.clone(), passed: *passed, current: *current, candidate: *candidate, limit: *limit }
    };
    verdicts.iter().map(message).collect()
}

/// `share`: of the time while requests run; 1 of all.
fn step(step: &Step, share: f64) -> proto::watch_tuning_response::Step {
    let told = [("total", Some(step.loss)), ("lm", Some(step.lm_loss)), ("distill", step.distill_loss)];
    let told = told.into_iter().filter_map(|(name, loss)| Some((name.to_owned(), loss?)));
    proto::watch_tuning_response::Step {
        step: saturate(step.step),
        losses: told.chain(step.losses.clone()).collect(),
        grad_norm: step.grad_norm,
        router_grad_norm: step.router_grad_norm,
        learning_rate: step.learning_rate,
        temperature: step.sharpness,
        tokens_per_second: step.tokens_per_second,
        eta_seconds: step.eta_seconds,
        skipped_steps: saturate(step.skipped),
        share,
        loads: step.loads.clone(),
    }
}

fn state(state: JobState) -> proto::TuningState {
    match state {
        JobState::Running => proto::TuningState::Running,
        JobState::Paused => proto::TuningState::Paused,
        JobState::Done => proto::TuningState::Done,
        JobState::Stopped => proto::TuningState::Stopped,
        JobState::Failed => proto::TuningState::Failed,
    }
}

fn phase(phase: JobPhase) -> proto::TuningPhase {
    match phase {
        JobPhase::Draining => proto::TuningPhase::Draining,
        JobPhase::Baseline => proto::TuningPhase::Baseline,
        JobPhase::Training => proto::TuningPhase::Training,
        JobPhase::Evaluating => proto::TuningPhase::Evaluating,
        JobPhase::Saving => proto::TuningPhase::Saving,
    }
}

fn memory(plan: &MemoryPlan) -> proto::TuningMemory {
    let MemoryPlan { variables, moments, gradients, candidate, activations, logits, teacher, evaluation, saving, data, total } = *plan;
    proto::TuningMemory { variables, moments, gradients, candidate, activations, logits, teacher, evaluation, data, total, saving }
}
