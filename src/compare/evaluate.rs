//! A net on test rows, under the training routing without noise and under hard routing.

use super::{
    arm::Route,
    metric::{Confusion, Distance},
    net::{Means, Net},
    results::{ByRouting, CellResult, Fidelity, Hardened, finite},
    step::router_outputs,
    task::{
        Batch, Targets,
        targets::{argmax, divergence},
    },
};
use crate::moe::{
    collapse::DEAD,
    draw::Draw,
    estimator::{Estimator, RoutedBatch, StepContext},
};

/// What is evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    /// Weights.
    pub net: &'a Net,
    /// As at the end of training.
    pub estimator: &'a Estimator,
    /// Who decides the route.
    pub route: Route,
    /// Means that stand in for experts that do not run, in the training routing.
    pub means: &'a Means,
    /// Bias of the choice, of loss-free balancing, which is served too; empty for none.
    pub bias: &'a [f64],
}

/// One routing of test rows.
#[derive(Clone, Debug)]
pub struct Evaluated {
    /// `[T, O]`.
    pub y: Vec<f64>,
    /// Mean loss.
    pub loss: f64,
    /// Share of right classes.
    pub accuracy: Option<f64>,
    /// Router outputs.
    pub z: Vec<f64>,
    /// The routing.
    pub routed: RoutedBatch,
}

/// What the curves of a run have of a set of rows.
#[derive(Clone, Debug, Default)]
pub struct Point {
    /// Mean loss under the training routing without noise.
    pub soft: f64,
    /// Mean loss under hard top-1.
    pub hard: f64,
    /// Outputs of one from those of the other.
    pub apart: Distance,
    /// Share of hard top-1 per expert, `[E]`.
    pub load: Vec<f64>,
}

impl Point {
    /// Adds a part of the rows that is such a share of all.
    pub fn add(&mut self, part: Point, share: f64) {
        self.soft += share * part.soft;
        self.hard += share * part.hard;
        self.apart = self.apart.and(part.apart);
        self.load.resize(part.load.len(), 0.0);
        self.load.iter_mut().zip(part.load).for_each(|(all, part)| *all += share * part);
    }
}

/// Rows at once, where a point is measured: as many as a step has, so that the curves take no memory of their own.
const AT_ONCE: usize = 256;

impl Model<'_> {
    /// A point of the curves: the same figures as those of the end ([`Self::measure`]), of any rows.
    pub fn point(&self, test: &Batch) -> Point {
        let mut point = Point::default();
        for first in (0..test.rows()).step_by(AT_ONCE) {
            let rows = test.part(first..first + AT_ONCE);
            let (soft, hard) = (self.soft(&rows), self.hard(&rows, 1));
            let part = Point { soft: soft.loss, hard: hard.loss, apart: Distance::of(&soft.y, &hard.y), load: load(&hard.routed) };
            point.add(part, rows.rows() as f64 / test.rows() as f64);
        }
        point
    }

    /// Under the training routing without noise.
    pub fn soft(&self, batch: &Batch) -> Evaluated {
        self.under(batch, self.estimator)
    }

    /// Under hard top-k.
    pub fn hard(&self, batch: &Batch, k: usize) -> Evaluated {
        self.under(batch, &self.estimator.hard(k))
    }

    fn under(&self, batch: &Batch, estimator: &Estimator) -> Evaluated {
        let z = router_outputs(self.net, self.route, batch, &batch.x);
        let bias = (!self.bias.is_empty()).then_some(self.bias);
        let routed = estimator.route(&z, self.net.shape.experts, &StepContext { bias, ..StepContext::evaluate(Draw::new(0, 0, 0)) });
        let y = self.net.forward(&batch.x, &routed, estimator.combine, self.means).y;
        let mut unused = vec![0.0; y.len()];
        let losses = batch.targets.loss(&y, batch.outputs, &mut unused);
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        Evaluated { loss, accuracy: batch.targets.accuracy(&y, batch.outputs), y, z, routed }
    }

    /// Everything about quality, load and routing; the rest of the result is left as it is by default.
    pub fn measure(&self, test: &Batch, teacher: Option<&[f64]>) -> CellResult {
        let (soft, hard1) = (self.soft(test), self.hard(test, 1));
        let hard2 = self.route.has_router().then(|| self.hard(test, 2));
        let by_routing = |value: fn(&Evaluated) -> Option<f64>| ByRouting {
            train: value(&soft),
            hard1: value(&hard1),
            hard2: hard2.as_ref().and_then(value),
        };
        let confusion = confusion(&hard1.routed, test);
        let stats = hard1.routed.stats(&hard1.z);
        let accuracy = by_routing(|evaluated| evaluated.accuracy);
        CellResult {
            loss: by_routing(|evaluated| finite(evaluated.loss)),
            accuracy: accuracy.train.map(|_| accuracy),
            rel_l2: Hardened {
                hard1: Distance::of(&soft.y, &hard1.y).relative(),
                hard2: hard2.as_ref().and_then(|hard2| Distance::of(&soft.y, &hard2.y).relative()),
            },
            missed_mass: self.route.has_router().then(|| missed_mass(&soft.routed, &hard1.routed)).and_then(finite),
            agreement: confusion.agreement(),
            nmi: confusion.nmi(),
            utilisation: stats.utilization(),
            dead: stats.below(DEAD),
            max_vio: finite(stats.max_vio()),
            gini: finite(stats.gini()),
            load_entropy: finite(stats.load_entropy()),
            router_entropy: self.route.has_router().then(|| stats.router_entropy()).and_then(finite),
            fidelity: teacher.map(|teacher| fidelity(test, teacher, &hard1.y)),
            ..CellResult::default()
        }
    }
}

/// Share of tokens per expert.
pub fn load(routed: &RoutedBatch) -> Vec<f64> {
    let counts = routed.rows().counts(0..routed.tokens, routed.experts);
    counts.iter().map(|n| n / routed.tokens.max(1) as f64).collect()
}

/// Top-1 experts against regions.
pub(super) fn confusion(hard1: &RoutedBatch, test: &Batch) -> Confusion {
    let regions = test.region.iter().max().map_or(0, |r| r + 1);
    let pairs = (0..hard1.tokens).filter_map(|t| Some((*hard1.rows().of(t).first()? as usize, *test.region.get(t)?)));
    Confusion::new(hard1.experts, regions, pairs)
}

/// Mean over tokens of the weight that is not on the top-1, where there is any weight.
pub(super) fn missed_mass(soft: &RoutedBatch, hard1: &RoutedBatch) -> f64 {
    let missed = |(t, weights): (usize, &[f64])| {
        let all: f64 = weights.iter().sum();
        let kept: f64 = hard1.rows().of(t).iter().map(|&e| weights[e as usize]).sum();
        (all > 0.0).then(|| (all - kept) / all)
    };
    let missed: Vec<f64> = soft.weights.chunks_exact(soft.experts.max(1)).enumerate().filter_map(missed).collect();
    missed.iter().sum::<f64>() / missed.len().max(1) as f64
}

fn fidelity(test: &Batch, teacher: &[f64], y: &[f64]) -> Fidelity {
    match test.targets {
        Targets::Values(_) => Fidelity { rel_l2: Distance::of(teacher, y).relative(), ..Fidelity::default() },
        Targets::Classes(_) => of_classes(teacher, y, test.outputs),
    }
}

/// How far logits of so many classes are from the teacher's.
pub(super) fn of_classes(teacher: &[f64], logits: &[f64], classes: usize) -> Fidelity {
    let mut unused = vec![0.0; classes];
    let rows = || logits.chunks_exact(classes).zip(teacher.chunks_exact(classes));
    let kl: f64 = rows().map(|(student, teacher)| divergence(student, teacher, &mut unused)).sum();
    let same = rows().filter(|(student, teacher)| argmax(student) == argmax(teacher)).count();
    let share = |x: f64| finite(x / rows().count().max(1) as f64);
    Fidelity { rel_l2: Distance::of(teacher, logits).relative(), kl: share(kl), agreement: share(same as f64) }
}
