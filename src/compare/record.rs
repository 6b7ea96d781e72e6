//! What is noted down while a cell trains, of the small net and of the decoder alike.

use super::{
    cost,
    evaluate::Point,
    metric::quantile,
    results::{CellResult, Curves, Duration, RouterGradient, brief, finite},
    spec::{Budget, CellSpec},
};
use crate::moe::{estimator::EstimatorSpec, remedy::Action};

/// Lines of remedies that a result keeps.
const REMEDY_LINES: usize = 50;

/// Where a training stands and what it has come to.
#[derive(Debug, Default)]
pub struct Record {
    /// Updates done.
    pub updates: usize,
    /// A loss or gradient was not finite.
    pub diverged: bool,
    /// Growth of memory until the end of training, bytes.
    pub peak_bytes: Option<u64>,
    /// Products of experts per token and layer, summed over updates.
    spent: f64,
    milliseconds: Vec<f64>,
    /// Norm of the task's gradient at the router, per update.
    norms: Vec<f64>,
    /// Updates in `norms` at the last point.
    norms_at_point: usize,
    executed: u64,
    products: f64,
    rows: u64,
    curves: Curves,
    remedies: Vec<String>,
    /// Actions of remedies.
    pub remedy_actions: usize,
}

/// One update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Tokens of the batch, times the layers that route.
    pub rows: u64,
    /// Rows pushed through experts.
    pub executed: u64,
    /// Products of rows with experts, forward and backward.
    pub products: f64,
    /// Norm of the task's gradient at the router.
    pub norm: f64,
    /// CPU time.
    pub milliseconds: f64,
}

impl Record {
    /// Where schedules stand, in steps of the full run; `None` at the end.
    pub fn clock(&self, spec: &CellSpec) -> Option<usize> {
        let steps = spec.size.steps;
        let clock = match spec.budget {
            Budget::Steps => self.updates,
            Budget::Flops => (self.spent / cost::OF_A_ROW) as usize,
        };
        (clock < steps && self.updates < steps).then_some(clock)
    }

    /// After an update.
    pub fn update(&mut self, update: Update) {
        self.updates += 1;
        self.spent += update.products / update.rows.max(1) as f64;
        self.executed += update.executed;
        self.products += update.products;
        self.rows += update.rows;
        self.norms.push(update.norm);
        self.milliseconds.push(update.milliseconds);
    }

    /// After a remedy acted; `place` is which layer, as in `, layer 1`, or nothing.
    pub fn remedy(&mut self, place: &str, action: &Action) {
        if self.remedies.len() < REMEDY_LINES {
            self.remedies.push(format!("step {}{place}: {action}", self.updates));
        }
        self.remedy_actions += 1;
    }

    /// A point of the curves, at a place of the schedules of `estimator`.
    pub fn point(&mut self, point: Point, estimator: &EstimatorSpec, clock: usize, steps: usize) {
        let sharpness = ["temperature", "width"].iter().find_map(|name| estimator.number_at(name, clock, steps));
        let grad_norm = mean(&self.norms[self.norms_at_point..]);
        let curves = &mut self.curves;
        curves.step.push(clock);
        curves.loss.push(brief(point.soft));
        curves.hard1.push(brief(point.hard));
        curves.gap.push(point.apart.relative().and_then(brief));
        curves.sharpness.push(sharpness.and_then(brief));
        curves.grad_norm.push(grad_norm.and_then(brief));
        curves.load.push(point.load.into_iter().filter_map(brief).collect());
        self.norms_at_point = self.norms.len();
    }

    /// What was noted, in its places of a result; the rest is as in `measured`.
    pub fn result(self, measured: CellResult) -> CellResult {
        let rows = self.rows.max(1) as f64;
        CellResult {
            router_grad: RouterGradient { norm: mean(&self.norms), ..measured.router_grad },
            executed_per_token: self.executed as f64 / rows,
            products_per_token: self.products / rows,
            step_ms: Duration { median: quantile(&self.milliseconds, 0.5), p90: quantile(&self.milliseconds, 0.9) },
            peak_bytes: self.peak_bytes,
            steps: self.updates,
            diverged: self.diverged,
            remedies: self.remedies,
            remedy_actions: self.remedy_actions,
            curves: self.curves,
            ..measured
        }
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() { None } else { finite(values.iter().sum::<f64>() / values.len() as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::estimator::{EstimatorConfig, Purpose};

    #[test]
    fn what_was_noted_is_in_the_result() {
        let config = EstimatorConfig { name: "soft".into(), k: None, params: Default::default() };
        let estimator = EstimatorSpec::new(&config, 4, 10, Purpose::Laboratory).expect("sound");
        let mut record = Record::default();
        for (step, norm) in [1.0, 3.0, 8.0].into_iter().enumerate() {
            record.point(Point { load: vec![0.25; 4], ..Point::default() }, &estimator, step, 10);
            record.update(Update { rows: 4, executed: 8, products: 24.0, norm, milliseconds: norm });
        }
        record.remedy(", layer 1", &Action::BumpBias { expert: 2, to: 0.5 });
        assert_eq!((record.updates, record.spent), (3, 18.0), "products of a token, added up");
        let result = record.result(CellResult {
            dead: 3,
            router_grad: RouterGradient { bias: Some(0.5), ..Default::default() },
            ..Default::default()
        });
        assert_eq!((result.executed_per_token, result.products_per_token, result.steps), (2.0, 6.0, 3));
        assert_eq!((result.router_grad.norm, result.router_grad.bias, result.dead), (Some(4.0), Some(0.5), 3));
        assert_eq!(result.step_ms, Duration { median: 3.0, p90: 3.0 });
        assert_eq!(result.curves.grad_norm, [None, Some(1.0), Some(3.0)], "since the point before");
        assert_eq!((result.curves.step, result.curves.sharpness), (vec![0, 1, 2], vec![Some(1.0); 3]));
        assert!(result.remedies.len() == 1 && result.remedies[0].starts_with("step 3, layer 1: "), "{:?}", result.remedies);
    }
}
