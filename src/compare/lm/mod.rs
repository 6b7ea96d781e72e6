//! Language-model cells: the product's own decoder on bytes of four domains.
//!
//! Training is [`crate::train::learner`], so that these cells measure the code that `hardmax train` runs.

mod evaluate;
mod model;
mod routes;
mod teacher;
#[cfg(test)]
mod tests;
mod text;

use std::{path::Path, sync::Arc};

use self::{
    evaluate::{Evaluated, Model},
    model::{model_spec, optimizer, plan, rate},
    routes::{ByDomain, ByHash, FixedRoute},
    text::{Corpus, LENGTH, Windows},
};
use super::{
    arm::{Arm, Route},
    clock::cpu_time,
    cost::{self, Rows},
    memory::Watermark,
    metric::quantile,
    results::{CellResult, Curves, Duration, RouterGradient, finite},
    spec::{Budget, CellSpec},
};
use crate::{
    error::Result,
    model::Decoder,
    train::{
        learner::{Distillation, Learner, Setup, StepReport, Text},
        optimizer::Outcome,
        routing::RoutingPlan,
        trainable::Learning,
    },
};

/// Test windows of a point of the curves: as many of each domain.
const POINT_WINDOWS: usize = 8;
/// Training windows by which the teacher's experts are matched to domains.
const MATCHING_WINDOWS: usize = 16;
/// Lines of remedies that a result keeps.
const REMEDY_LINES: usize = 50;

/// Trains and measures the cell; writes the weights of a teacher into `cells`, and reads those of its own from there.
pub fn run(spec: &CellSpec, cells: &Path) -> Result<CellResult> {
    let mut cell = Cell::new(spec, cells)?;
    cell.train()?;
    let result = cell.result()?;
    if spec.is_teacher() {
        teacher::write(cell.learner.model(), &spec.weights(cells)?)?;
    }
    Ok(result)
}

/// A cell while it trains.
#[derive(Debug)]
struct Cell<'a> {
    spec: &'a CellSpec,
    corpus: Corpus,
    test: Windows,
    learner: Learner,
    /// On weights that are not tracked: always the present ones.
    decoder: Decoder,
    /// What the router learns under in the end; until then ([`Route::ExpertsAfter`]) the learner has another plan.
    own: RoutingPlan,
    teacher: Option<Decoder>,
    route: Option<Box<dyn FixedRoute>>,
    updates: usize,
    /// Products of experts per token and layer, summed over updates.
    spent: f64,
    memory: Watermark,
    record: Record,
}

/// What is noted down.
#[derive(Debug, Default)]
struct Record {
    milliseconds: Vec<f64>,
    norms: Vec<f64>,
    norms_at_point: usize,
    executed: u64,
    products: f64,
    rows: u64,
    peak_bytes: Option<u64>,
    curves: Curves,
    remedies: Vec<String>,
    remedy_actions: usize,
    diverged: bool,
}

impl<'a> Cell<'a> {
    fn new(spec: &'a CellSpec, cells: &Path) -> Result<Self> {
        let memory = Watermark::set();
        let corpus = Corpus::new();
        let own = plan(spec, &spec.arm)?;
        let begin = match spec.arm.route {
            Route::ExpertsAfter { share } if share > 0.0 => plan(spec, &Arm::teacher())?,
            _ => own.clone(),
        };
        let shape = Arc::new(model_spec(spec));
        let learner = Learner::new(Setup { spec: Arc::clone(&shape), plan: begin, optimizer: optimizer(spec), seed: spec.seed })?;
        let teacher = match spec.teacher() {
            Some(of) => {
                let weights = teacher::read(&of.weights(cells)?)?;
                let teacher = teacher::decoder(spec, &weights)?;
                let order = match spec.arm.route {
                    // The best route is to lead to the experts that are at home there.
                    Route::Oracle => {
                        let windows = corpus.batch(spec.seed, 0, MATCHING_WINDOWS);
                        Some(teacher::order(&teacher, &windows, spec.task.experts())?)
                    }
                    _ => None,
                };
                teacher::copy(&weights, &learner, spec.arm.route, own.estimator(0), order.as_deref())?;
                Some(teacher)
            }
            None => None,
        };
        let decoder = Decoder::new(shape, learner.model().detached(), learner.kernel())?;
        let route: Option<Box<dyn FixedRoute>> = match spec.arm.route {
            Route::Hash => Some(Box::new(ByHash { experts: spec.task.experts() })),
            Route::Oracle => Some(Box::new(ByDomain)),
            Route::Learned | Route::Frozen | Route::ExpertsAfter { .. } | Route::Untouched => None,
        };
        let test = corpus.test(spec.size.test);
        let record = Record::default();
        Ok(Self { spec, corpus, test, learner, decoder, own, teacher, route, updates: 0, spent: 0.0, memory, record })
    }

    fn train(&mut self) -> Result<()> {
        let some = self.test.part(0..POINT_WINDOWS);
        let mut next = 0;
        while let Some(clock) = self.clock() {
            self.change_plan(clock)?;
            if next < self.spec.size.points && clock * self.spec.size.points >= next * self.spec.size.steps {
                self.note_point(clock, &some)?;
                next += 1;
            }
            if !self.advance(clock)? {
                self.record.diverged = true;
                break;
            }
        }
        self.record.peak_bytes = self.memory.growth();
        self.note_point(self.spec.size.steps, &some)
    }

    /// Where schedules stand, in steps of the full run; `None` at the end.
    fn clock(&self) -> Option<usize> {
        let steps = self.spec.size.steps;
        let clock = match self.spec.budget {
            Budget::Steps => self.updates,
            Budget::Flops => (self.spent / cost::OF_A_ROW) as usize,
        };
        (clock < steps && self.updates < steps).then_some(clock)
    }

    /// After its share of the steps, experts learn alone.
    fn change_plan(&mut self, clock: usize) -> Result<()> {
        let Route::ExpertsAfter { share } = self.spec.arm.route else { return Ok(()) };
        let due = clock as f64 >= share * self.spec.size.steps as f64;
        if due && self.learner.plan().learning == Learning::All {
            self.learner.change_plan(self.own.clone())?;
        }
        Ok(())
    }

    /// One update; false if something was not finite.
    fn advance(&mut self, clock: usize) -> Result<bool> {
        let (started, size) = (cpu_time(), self.spec.size);
        let windows = self.corpus.batch(self.spec.seed, self.updates, size.batch);
        let route = self.route.as_ref().map(|route| route.of(&windows));
        let arm = &self.spec.arm;
        let asked = arm.distill > 0.0 || arm.follows_router();
        let teacher = self.teacher.as_ref().filter(|_| asked).map(|teacher| teacher::soft(teacher, &windows)).transpose()?;
        let routers = teacher.as_ref().map(Evaluated::routers).unwrap_or_default();
        let text = Text {
            inputs: &windows.inputs,
            targets: &windows.targets,
            length: LENGTH,
            route: route.as_deref(),
            teacher: teacher.as_ref().map(|teacher| Distillation { logits: &teacher.logits, weight: arm.distill, routers: &routers }),
        };
        let report = self.learner.step(clock, text, rate(self.spec, clock))?;
        self.note_step(&report, windows.inputs.len(), teacher.map_or(0, |teacher| teacher.executed()));
        self.record.milliseconds.push((cpu_time() - started).as_secs_f64() * 1e3);
        self.updates += 1;
        Ok(report.lm_loss.is_finite() && report.outcome != Outcome::Skipped)
    }

    /// `teacher` are the rows that a teacher's experts ran.
    fn note_step(&mut self, report: &StepReport, tokens: usize, teacher: u64) {
        let rows = (tokens * report.layers.len()) as u64;
        let executed: u64 = report.layers.iter().map(|stats| stats.executed).sum();
        // Whatever the decoder runs it differentiates, also where the weight is 0.
        let products = Rows { forward: executed, backward: executed, teacher }.products(&report.estimator, self.spec.task.experts());
        self.spent += products / rows.max(1) as f64;
        let record = &mut self.record;
        record.executed += executed;
        record.products += products;
        record.rows += rows;
        record.norms.push(report.task_gradient);
        record.remedy_actions += report.actions.len();
        for (layer, action) in &report.actions {
            if record.remedies.len() < REMEDY_LINES {
                record.remedies.push(format!("step {}, layer {layer}: {action}", self.updates));
            }
        }
    }

    fn model(&self, clock: usize) -> Model<'_> {
        let mut layers = self.learner.memory().layers.clone();
        if self.spec.arm.bias_rate == 0.0 {
            // What remedies raised is not served.
            layers.iter_mut().for_each(|layer| layer.bias.clear());
        }
        let estimator = self.learner.plan().estimator(clock);
        Model { decoder: &self.decoder, estimator, layers, route: self.route.as_deref() }
    }

    fn note_point(&mut self, clock: usize, windows: &Windows) -> Result<()> {
        let model = self.model(clock);
        let point = model.point(windows)?;
        let steps = self.spec.size.steps;
        let sharpness = ["temperature", "width"].iter().find_map(|name| self.own.estimator.number_at(name, clock, steps));
        let norms = &self.record.norms[self.record.norms_at_point..];
        let grad_norm = if norms.is_empty() { None } else { finite(norms.iter().sum::<f64>() / norms.len() as f64) };
        let curves = &mut self.record.curves;
        curves.step.push(clock);
        curves.loss.push(finite(point.soft));
        curves.hard1.push(finite(point.hard));
        curves.gap.push(point.apart.relative());
        curves.sharpness.push(sharpness);
        curves.grad_norm.push(grad_norm);
        curves.load.push(point.load);
        self.record.norms_at_point = self.record.norms.len();
        Ok(())
    }

    fn result(&self) -> Result<CellResult> {
        let steps = self.spec.size.steps;
        let teacher = self.teacher.as_ref().map(|teacher| teacher::soft(teacher, &self.test)).transpose()?;
        let model = self.model(steps);
        let (record, norms) = (&self.record, &self.record.norms);
        Ok(CellResult {
            settings: self.spec.settings()?,
            trivial: self.corpus.trivial(&self.test),
            router_grad: RouterGradient {
                norm: if norms.is_empty() { None } else { finite(norms.iter().sum::<f64>() / norms.len() as f64) },
                ..RouterGradient::default()
            },
            executed_per_token: record.executed as f64 / record.rows.max(1) as f64,
            executed_expected: cost::expected(self.spec, &model.estimator, self.updates),
            products_per_token: record.products / record.rows.max(1) as f64,
            step_ms: Duration { median: quantile(&record.milliseconds, 0.5), p90: quantile(&record.milliseconds, 0.9) },
            peak_bytes: record.peak_bytes,
            steps: self.updates,
            diverged: record.diverged,
            remedies: record.remedies.clone(),
            remedy_actions: record.remedy_actions,
            curves: record.curves.clone(),
            ..model.measure(&self.test, teacher.as_ref().map(|teacher| &teacher.logits[..]))?
        })
    }
}
