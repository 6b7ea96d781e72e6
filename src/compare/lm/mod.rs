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
    record::{Record, Update},
    results::CellResult,
    spec::CellSpec,
};
use crate::{
    error::Result,
    memory::Watermark,
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

/// Trains and measures the cell; writes the weights of a teacher into `cells`, and reads those of its own from there.
pub fn run(spec: &CellSpec, cells: &Path) -> Result<CellResult> {
    let mut cell = Cell::new(spec, cells)?;
    cell.train()?;
    let measured = cell.measured()?;
    if spec.is_teacher() {
        teacher::write(cell.learner.model(), &spec.weights(cells)?)?;
    }
    Ok(cell.record.result(measured))
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
    memory: Watermark,
    record: Record,
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
        Ok(Self { spec, corpus, test, learner, decoder, own, teacher, route, memory, record })
    }

    fn train(&mut self) -> Result<()> {
        let some = self.test.part(0..POINT_WINDOWS);
        let mut next = 0;
        while let Some(clock) = self.record.clock(self.spec) {
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
        let windows = self.corpus.batch(self.spec.seed, self.record.updates, size.batch);
        let route = self.route.as_ref().map(|route| route.of(&windows));
        let arm = &self.spec.arm;
        let asked = arm.distill > 0.0 || arm.follows_router();
        let teacher = self.teacher.as_ref().filter(|_| asked).map(|teacher| teacher::soft(teacher, &windows)).transpose()?;
        let routers = teacher.as_ref().map(Evaluated::routers).unwrap_or_default();
        let logits = teacher.as_ref().map(Evaluated::logits).transpose()?;
        let text = Text {
            inputs: &windows.inputs,
            targets: &windows.targets,
            length: LENGTH,
            route: route.as_deref(),
            teacher: logits.as_ref().map(|logits| Distillation { logits, weight: arm.distill, lm_weight: 1.0, routers: &routers }),
        };
        let report = self.learner.step(clock, text, rate(self.spec, clock))?;
        for (layer, action) in &report.actions {
            self.record.remedy(&format!(", layer {layer}"), action);
        }
        let update = self.update(&report, windows.inputs.len(), teacher.map_or(0, |teacher| teacher.executed()));
        self.record.update(Update { milliseconds: (cpu_time() - started).as_secs_f64() * 1e3, ..update });
        Ok(report.lm_loss.is_finite() && report.outcome != Outcome::Skipped)
    }

    /// `teacher` are the rows that a teacher's experts ran.
    fn update(&self, report: &StepReport, tokens: usize, teacher: u64) -> Update {
        let executed: u64 = report.layers.iter().map(|stats| stats.executed).sum();
        // Whatever the decoder runs it differentiates, also where the weight is 0.
        let products = Rows { forward: executed, backward: executed, teacher }.products(&report.estimator, self.spec.task.experts());
        let rows = (tokens * report.layers.len()) as u64;
        Update { rows, executed, products, norm: report.task_gradient, milliseconds: 0.0 }
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
        let point = self.model(clock).point(windows)?;
        self.record.point(point, &self.own.estimator, clock, self.spec.size.steps);
        Ok(())
    }

    /// The trained model on all test windows, and what its settings are.
    fn measured(&self) -> Result<CellResult> {
        let teacher = self.teacher.as_ref().map(|teacher| teacher::soft(teacher, &self.test)).transpose()?;
        let model = self.model(self.spec.size.steps);
        Ok(CellResult {
            settings: self.spec.settings()?,
            trivial: self.corpus.trivial(&self.test),
            executed_expected: cost::expected(self.spec, &model.estimator, self.record.updates),
            ..model.measure(&self.test, teacher.as_ref().map(|teacher| &teacher.logits[..]))?
        })
    }
}
