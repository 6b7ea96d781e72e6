//! What tuning jobs say of themselves: the series of the one that was heard of last, sums over all of them, and curves for the live page.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    catalog::{self, Family, TURN_BUCKETS},
    exposition::{Exposition, FixedHistogram},
    labels::{GradientPart, LossPart, PublishOutcome, RollbackReason, Stage, TunedRouting, TuningState},
};

/// Points of a curve at most. One that is full loses every second of them.
const MOST_POINTS: usize = 256;

/// A tuning job at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TuningSnapshot {
    /// Its identifier.
    pub job: String,
    /// What learns, as `router+experts`.
    pub target: String,
    /// How its routers learn.
    pub estimator: String,
    /// What it is.
    pub state: TuningState,
    /// Steps done.
    pub step: usize,
    /// Steps to do.
    pub steps: usize,
    /// Of the last step; without any part those that were said before, with the norms that follow.
    pub losses: TuningLosses,
    /// Of the last step, before clipping; `None` where it was not finite.
    pub gradient_norm: Option<f64>,
    /// The routers' part of it.
    pub router_gradient_norm: Option<f64>,
    /// On held-out text before the first step.
    pub before: Option<TuningFigures>,
    /// The same at the last evaluation.
    pub now: Option<TuningFigures>,
    /// Until the last step; `None` where nobody knows, or it does not run.
    pub eta_seconds: Option<f64>,
    /// Share of the time while requests run, 1 being exclusive; `None` where it does not run.
    pub share: Option<f64>,
}

/// What a step was to make smaller, in nats per token; `None` for what is no part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TuningLosses {
    /// All of it.
    pub total: Option<f64>,
    /// Of the next token.
    pub lm: Option<f64>,
    /// Divergence from the teacher by its weight.
    pub distill: Option<f64>,
    /// Auxiliary losses by their weights.
    pub auxiliary: Option<f64>,
}

/// Weights on held-out text under hard routings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TuningFigures {
    /// Under the routing that is to be served.
    pub serving: TuningGap,
    /// Under top-1; `None` where that is the serving routing.
    pub top1: Option<TuningGap>,
    /// Under top-2; `None` where that is the serving routing.
    pub top2: Option<TuningGap>,
}

/// Weights on held-out text under one hard routing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct TuningGap {
    /// `KL(reference ‖ routing)` of the same weights, nats per token.
    pub gap_nats: f64,
    /// Perplexity over that of the weights before under their reference routing.
    pub perplexity_ratio: f64,
    /// Experts without a token, all layers together.
    pub dead_experts: usize,
}

/// What the live page draws of tuning.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct TuningCurves {
    job: Option<TuningSnapshot>,
    /// (step, value), by step.
    loss: Vec<(usize, f64)>,
    /// (step, value of each [`TunedRouting`]), by step.
    gap: Vec<(usize, [f64; 3])>,
    switch: Option<SwitchTold>,
}

/// The last thing that was put in force, or was to be.
#[derive(Clone, Copy, Debug, Serialize)]
struct SwitchTold {
    #[serde(flatten)]
    what: Switch,
    /// In force since then.
    generation: u64,
    seconds_ago: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Switch {
    Publish(PublishOutcome),
    Rollback(RollbackReason),
}

/// A value by step, thinned as it grows.
#[derive(Clone, Debug)]
struct Curve<T> {
    points: Vec<(usize, T)>,
    /// Steps between two points at least.
    stride: usize,
}

/// A family, and what it says of a routing.
type OfGap = (&'static Family, fn(&TuningGap) -> f64);

/// All that there is of tuning.
#[derive(Debug)]
pub(super) struct Tuning {
    model: String,
    /// Of each [`TuningState`].
    jobs: [usize; TuningState::ALL.len()],
    job: Option<TuningSnapshot>,
    loss: Curve<f64>,
    gap: Curve<[f64; 3]>,
    tokens: u64,
    skipped_steps: u64,
    turns: FixedHistogram,
    /// Of each [`PublishOutcome`].
    publishes: [u64; PublishOutcome::ALL.len()],
    /// Of each [`RollbackReason`].
    rollbacks: [u64; RollbackReason::ALL.len()],
    /// What, which generation then was in force, and when.
    switch: Option<(Switch, u64, Instant)>,
}

// === impl TuningFigures ===

impl TuningFigures {
    /// Of each [`TunedRouting`].
    fn all(&self) -> [TuningGap; 3] {
        [self.serving, self.top1.unwrap_or(self.serving), self.top2.unwrap_or(self.serving)]
    }
}

// === impl TuningLosses ===

impl TuningLosses {
    /// Of each [`LossPart`].
    fn all(&self) -> [f64; 4] {
        [self.total, self.lm, self.distill, self.auxiliary].map(|part| part.unwrap_or(0.0))
    }
}

// === impl Curve ===

impl<T: Copy> Default for Curve<T> {
    fn default() -> Self {
        Self { points: Vec::new(), stride: 1 }
    }
}

impl<T: Copy> Curve<T> {
    /// A value. What was said of this step and of later ones is forgotten: a job that went on from an older state does them anew.
    fn push(&mut self, step: usize, value: T) {
        self.points.retain(|&(before, _)| before < step);
        if self.points.last().is_some_and(|&(before, _)| step < before + self.stride) {
            return;
        }
        if self.points.len() == MOST_POINTS {
            let mut place = 0;
            self.points.retain(|_| {
                place += 1;
                place % 2 == 1
            });
            self.stride *= 2;
        }
        self.points.push((step, value));
    }
}

// === impl Tuning ===

impl Tuning {
    /// Nothing yet.
    pub(super) fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            jobs: Default::default(),
            job: None,
            loss: Curve::default(),
            gap: Curve::default(),
            tokens: 0,
            skipped_steps: 0,
            turns: FixedHistogram::new(TURN_BUCKETS),
            publishes: Default::default(),
            rollbacks: Default::default(),
            switch: None,
        }
    }

    pub(super) fn set(&mut self, snapshot: &TuningSnapshot) {
        let before = self.job.take().filter(|job| job.job == snapshot.job);
        if before.is_none() {
            (self.loss, self.gap) = Default::default();
        }
        self.draw(snapshot, before.as_ref().and_then(|job| job.now));
        let mut job = snapshot.clone();
        if let Some(before) = before.filter(|_| job.losses == TuningLosses::default()) {
            job.losses = before.losses;
            (job.gradient_norm, job.router_gradient_norm) = (before.gradient_norm, before.router_gradient_norm);
        }
        self.job = Some(job);
    }

    /// Goes on with the curves, which have the figures `known` already.
    fn draw(&mut self, snapshot: &TuningSnapshot, known: Option<TuningFigures>) {
        let gaps = |figures: TuningFigures| figures.all().map(|gap| gap.gap_nats);
        if let Some(before) = snapshot.before.filter(|_| self.gap.points.is_empty()) {
            self.gap.push(0, gaps(before));
        }
        if let Some(now) = snapshot.now.filter(|_| snapshot.now != known) {
            self.gap.push(snapshot.step, gaps(now));
        }
        if let Some(total) = snapshot.losses.total {
            self.loss.push(snapshot.step, total);
        }
    }

    pub(super) fn set_jobs(&mut self, count: impl Fn(TuningState) -> usize) {
        self.jobs.iter_mut().zip(TuningState::ALL).for_each(|(jobs, &state)| *jobs = count(state));
    }

    pub(super) fn step(&mut self, tokens: usize, skipped: bool) {
        self.tokens += tokens as u64;
        self.skipped_steps += u64::from(skipped);
    }

    pub(super) fn turn(&mut self, took: Duration) {
        self.turns.record(took.as_secs_f64());
    }

    pub(super) fn published(&mut self, outcome: PublishOutcome, generation: u64) {
        self.publishes[outcome as usize] += 1;
        self.switch = Some((Switch::Publish(outcome), generation, Instant::now()));
    }

    pub(super) fn rolled_back(&mut self, reason: RollbackReason, generation: u64) {
        self.rollbacks[reason as usize] += 1;
        self.switch = Some((Switch::Rollback(reason), generation, Instant::now()));
    }

    /// For the live page. A curve ends at the last step, whatever was thinned.
    pub(super) fn curves(&self) -> TuningCurves {
        let mut loss = self.loss.points.clone();
        let last = self.job.as_ref().and_then(|job| Some((job.step, job.losses.total?)));
        loss.extend(last.filter(|last| loss.last().is_none_or(|point| point.0 < last.0)));
        let told =
            |(what, generation, at): (Switch, u64, Instant)| SwitchTold { what, generation, seconds_ago: at.elapsed().as_secs_f64() };
        TuningCurves { job: self.job.clone(), loss, gap: self.gap.points.clone(), switch: self.switch.map(told) }
    }

    /// Writes every family. Whoever waits for the lock is a job between two turns, and no request.
    pub(super) fn write(&self, page: &mut Exposition) {
        let model = &self.model;
        page.family(&catalog::TUNING_JOBS);
        for (state, &jobs) in TuningState::LABELS.iter().zip(&self.jobs) {
            page.sample(&catalog::TUNING_JOBS, &[model, state], jobs as f64);
        }
        self.write_job(page);
        let mut single = |family: &Family, value: f64| page.single(family, &[model], value);
        single(&catalog::TUNING_TOKENS, self.tokens as f64);
        single(&catalog::TUNING_SKIPPED_STEPS, self.skipped_steps as f64);
        page.family(&catalog::TUNING_TURN_SECONDS);
        page.histogram(&catalog::TUNING_TURN_SECONDS, &[model], &self.turns);
        page.family(&catalog::PUBLISHES);
        for (outcome, &count) in PublishOutcome::LABELS.iter().zip(&self.publishes) {
            page.sample(&catalog::PUBLISHES, &[model, outcome], count as f64);
        }
        page.family(&catalog::ROLLBACKS);
        for (reason, &count) in RollbackReason::LABELS.iter().zip(&self.rollbacks) {
            page.sample(&catalog::ROLLBACKS, &[model, reason], count as f64);
        }
    }

    fn write_job(&self, page: &mut Exposition) {
        let (model, job) = (&self.model, self.job.as_ref());
        page.family(&catalog::TUNING_INFO);
        if let Some(job) = job {
            page.sample(&catalog::TUNING_INFO, &[model, &job.job, &job.target, &job.estimator], 1.0);
        }
        let mut single = |family: &Family, value: f64| page.single(family, &[model], value);
        single(&catalog::TUNING_STEP, job.map_or(0, |job| job.step) as f64);
        single(&catalog::TUNING_STEPS, job.map_or(0, |job| job.steps) as f64);
        single(&catalog::TUNING_ETA, job.and_then(|job| job.eta_seconds).unwrap_or(0.0));
        page.family(&catalog::TUNING_LOSS);
        for (part, value) in LossPart::LABELS.iter().zip(job.map_or([0.0; 4], |job| job.losses.all())) {
            page.sample(&catalog::TUNING_LOSS, &[model, part], value);
        }
        page.family(&catalog::TUNING_GRADIENT_NORM);
        let norms = job.map_or([None; 2], |job| [job.gradient_norm, job.router_gradient_norm]);
        for (part, norm) in GradientPart::LABELS.iter().zip(norms) {
            page.sample(&catalog::TUNING_GRADIENT_NORM, &[model, part], norm.unwrap_or(0.0));
        }
        self.write_figures(page, [job.and_then(|job| job.before), job.and_then(|job| job.now)]);
    }

    /// Of each [`Stage`].
    fn write_figures(&self, page: &mut Exposition, figures: [Option<TuningFigures>; 2]) {
        let value: [OfGap; 3] = [
            (&catalog::TUNING_GAP, |gap| gap.gap_nats),
            (&catalog::TUNING_PERPLEXITY_RATIO, |gap| gap.perplexity_ratio),
            (&catalog::TUNING_DEAD_EXPERTS, |gap| gap.dead_experts as f64),
        ];
        for (family, value) in value {
            page.family(family);
            for (stage, figures) in Stage::LABELS.iter().zip(figures) {
                let all = figures.map_or([TuningGap::default(); 3], |figures| figures.all());
                for (routing, gap) in TunedRouting::LABELS.iter().zip(&all) {
                    page.sample(family, &[&self.model, routing, stage], value(gap));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(gap_nats: f64) -> TuningGap {
        TuningGap { gap_nats, perplexity_ratio: 1.0 + gap_nats, dead_experts: 3 }
    }

    fn snapshot(step: usize) -> TuningSnapshot {
        TuningSnapshot {
            job: "t1".into(),
            target: "router".into(),
            estimator: "soft".into(),
            state: TuningState::Running,
            step,
            steps: 1000,
            losses: TuningLosses { total: Some(2.5), lm: Some(2.0), distill: Some(0.5), auxiliary: None },
            gradient_norm: Some(4.0),
            router_gradient_norm: None,
            before: Some(TuningFigures { serving: gap(0.5), top1: None, top2: Some(gap(0.25)) }),
            now: None,
            eta_seconds: Some(60.0),
            share: Some(0.25),
        }
    }

    fn value(tuning: &Tuning, series: &str) -> f64 {
        let mut page = Exposition::default();
        tuning.write(&mut page);
        let page = page.finish();
        let line = page.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn the_series_say_what_the_job_said() {
        let mut tuning = Tuning::new("m");
        tuning.set(&TuningSnapshot { now: Some(TuningFigures { serving: gap(0.125), top1: None, top2: Some(gap(0.0)) }), ..snapshot(7) });
        let of = |series: &str| value(&tuning, &format!("hardmax_tuning_{series}"));
        assert_eq!(of("info{model=\"m\",job=\"t1\",target=\"router\",estimator=\"soft\"}"), 1.0);
        assert_eq!((of("step{"), of("steps{"), of("eta_seconds{")), (7.0, 1000.0, 60.0));
        assert_eq!(
            ["total", "lm", "distill", "auxiliary"].map(|part| of(&format!("loss{{model=\"m\",part=\"{part}\"}}"))),
            [2.5, 2.0, 0.5, 0.0]
        );
        assert_eq!(["all", "router"].map(|part| of(&format!("gradient_norm{{model=\"m\",part=\"{part}\"}}"))), [4.0, 0.0]);
        let gaps =
            |stage: &str| ["serving", "top1", "top2"].map(|by| of(&format!("gap_nats{{model=\"m\",routing=\"{by}\",stage=\"{stage}\"}}")));
        assert_eq!((gaps("before"), gaps("now")), ([0.5, 0.5, 0.25], [0.125, 0.125, 0.0]), "top-1 is what is served");
        assert_eq!(of("perplexity_ratio{model=\"m\",routing=\"top2\",stage=\"before\"}"), 1.25);
        assert_eq!(of("dead_experts{model=\"m\",routing=\"top2\",stage=\"now\"}"), 3.0);
    }

    #[test]
    fn the_end_of_a_job_leaves_its_last_step() {
        let mut tuning = Tuning::new("m");
        let ended = |job: &str| TuningSnapshot {
            job: job.into(),
            losses: TuningLosses::default(),
            gradient_norm: None,
            state: TuningState::Done,
            ..snapshot(9)
        };
        tuning.set(&snapshot(8));
        tuning.set(&ended("t1"));
        let of = |tuning: &Tuning| {
            ["loss{model=\"m\",part=\"total\"}", "gradient_norm{model=\"m\",part=\"all\"}"]
                .map(|series| value(tuning, &format!("hardmax_tuning_{series}")))
        };
        assert_eq!(of(&tuning), [2.5, 4.0]);
        tuning.set(&ended("t2"));
        assert_eq!(of(&tuning), [0.0, 0.0], "another job");
    }

    #[test]
    fn sums_are_over_all_jobs() {
        let mut tuning = Tuning::new("m");
        tuning.step(100, false);
        tuning.set(&snapshot(1));
        tuning.set(&TuningSnapshot { job: "t2".into(), ..snapshot(0) });
        tuning.step(50, true);
        tuning.turn(Duration::from_millis(30));
        tuning.set_jobs(|state| if state == TuningState::Failed { 2 } else { 0 });
        let of = |series: &str| value(&tuning, series);
        assert_eq!((of("hardmax_tuning_tokens_total"), of("hardmax_tuning_skipped_steps_total")), (150.0, 1.0));
        let turns = |le: &str| of(&format!("hardmax_tuning_turn_seconds_bucket{{model=\"m\",le=\"{le}\"}}"));
        assert_eq!((turns("0.025"), turns("0.05")), (0.0, 1.0));
        assert_eq!(
            (of("hardmax_tuning_jobs{model=\"m\",state=\"failed\"}"), of("hardmax_tuning_jobs{model=\"m\",state=\"done\"}")),
            (2.0, 0.0)
        );
        for (n, &outcome) in PublishOutcome::ALL.iter().enumerate() {
            (0..=n).for_each(|_| tuning.published(outcome, 2));
            assert_eq!(value(&tuning, &format!("hardmax_publishes_total{{model=\"m\",outcome=\"{}\"}}", outcome.label())), n as f64 + 1.0);
        }
        for (n, &reason) in RollbackReason::ALL.iter().enumerate() {
            (0..=n).for_each(|_| tuning.rolled_back(reason, 1));
            assert_eq!(value(&tuning, &format!("hardmax_rollbacks_total{{model=\"m\",reason=\"{}\"}}", reason.label())), n as f64 + 1.0);
        }
        let told = serde_json::to_value(tuning.curves()).unwrap();
        assert_eq!((&told["switch"]["rollback"], &told["switch"]["generation"]), (&"errors".into(), &1.into()));
    }

    #[test]
    fn curves_are_thinned_and_end_at_the_last_step() {
        let mut tuning = Tuning::new("m");
        (1..=5000).for_each(|step| tuning.set(&snapshot(step)));
        let loss = tuning.curves().loss;
        assert!((MOST_POINTS / 2..=MOST_POINTS + 1).contains(&loss.len()), "{}", loss.len());
        assert_eq!((loss[0].0, loss[loss.len() - 1].0), (1, 5000));
        assert!(loss.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn a_job_that_goes_on_from_an_older_state_does_its_steps_anew() {
        let mut tuning = Tuning::new("m");
        let evaluated =
            |step, value| TuningSnapshot { now: Some(TuningFigures { serving: gap(value), top1: None, top2: None }), ..snapshot(step) };
        (1..=9).for_each(|step| tuning.set(&snapshot(step)));
        tuning.set(&evaluated(9, 0.25));
        (10..=12).for_each(|step| tuning.set(&evaluated(step, 0.25)));
        let steps = |tuning: &Tuning| tuning.curves().gap.iter().map(|point| point.0).collect::<Vec<_>>();
        assert_eq!(steps(&tuning), [0, 9], "a figure is of the step at which it was new");
        tuning.set(&snapshot(5));
        assert_eq!(tuning.curves().loss.last().unwrap().0, 5);
        tuning.set(&TuningSnapshot { job: "t2".into(), before: None, ..snapshot(1) });
        assert_eq!((steps(&tuning), tuning.curves().loss.len()), (vec![], 1), "another job");
    }
}
