//! A job as the series of the server show it.

use super::{job::Job, state::JobState};
use crate::{
    engine::Share,
    telemetry::{
        metrics::TuningState,
        tuning::{TuningFigures, TuningGap, TuningLosses, TuningSnapshot},
    },
    tune::{
        evaluate::{Figures, RoutingFigures},
        tuner::Step,
    },
};

/// `job` after the step `last`.
pub(super) fn snapshot(job: &Job, last: Option<&Step>) -> TuningSnapshot {
    let runs = job.state == JobState::Running;
    let reference = job.before.as_ref().map_or(f64::NAN, |before| before.reference_perplexity);
    let told = |figures: &Option<Figures>| figures.as_ref().and_then(|figures| of_figures(figures, reference));
    TuningSnapshot {
        job: job.id.to_string(),
        target: job.config.target.to_string(),
        estimator: job.config.routing.estimator.clone(),
        state: state(job.state),
        step: job.step,
        steps: job.steps,
        losses: last.map(|step| losses(job, step)).unwrap_or_default(),
        gradient_norm: last.and_then(|step| step.grad_norm),
        router_gradient_norm: last.and_then(|step| step.router_grad_norm),
        before: told(&job.before),
        now: told(&job.latest),
        eta_seconds: job.eta_seconds.filter(|_| runs),
        share: runs.then_some(match job.share {
            Share::Exclusive => 1.0,
            Share::Background { duty } => duty,
        }),
    }
}

/// The label of a state.
pub(super) fn state(state: JobState) -> TuningState {
    match state {
        JobState::Running => TuningState::Running,
        JobState::Paused => TuningState::Paused,
        JobState::Done => TuningState::Done,
        JobState::Stopped => TuningState::Stopped,
        JobState::Failed => TuningState::Failed,
    }
}

fn losses(job: &Job, step: &Step) -> TuningLosses {
    let lm_weight = job.config.distill.map_or(1.0, |distill| distill.lm_weight);
    let rest = step.loss - lm_weight * step.lm_loss - step.distill_loss.unwrap_or(0.0);
    let auxiliary = (!step.losses.is_empty()).then_some(rest);
    TuningLosses { total: Some(step.loss), lm: Some(step.lm_loss), distill: step.distill_loss, auxiliary }
}

fn of_figures(figures: &Figures, reference: f64) -> Option<TuningFigures> {
    let gap = |routing: &RoutingFigures| TuningGap {
        gap_nats: routing.kl,
        perplexity_ratio: routing.perplexity / reference,
        dead_experts: routing.dead.iter().sum(),
    };
    Some(TuningFigures { serving: gap(figures.serving()?), top1: figures.top(1).map(gap), top2: figures.top(2).map(gap) })
}
