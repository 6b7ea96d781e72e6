//! The soft-trained net that tuning starts from: kept in a file, copied into the student, run for its outputs.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    arm::Route,
    evaluate::confusion,
    net::{Forward, Means, Net, Shape},
    step::router_outputs,
    task::Batch,
};
use crate::{
    durable,
    error::{Error, Result},
    moe::{
        draw::Draw,
        estimator::{Estimator, Relaxation, RoutedBatch, StepContext},
    },
};

/// A trained net and its routing.
#[derive(Clone, Debug)]
pub struct Teacher {
    net: Net,
    estimator: Estimator,
}

/// Its file.
#[derive(Serialize, Deserialize)]
struct Weights {
    router: Vec<f64>,
    experts: Vec<f64>,
}

impl Teacher {
    /// The teacher with weights from `path`; `estimator` is how it was trained.
    pub fn read(path: &Path, shape: Shape, estimator: Estimator) -> Result<Self> {
        let text = fs::read(path).map_err(|error| Error::io(path, error))?;
        let weights: Weights = serde_json::from_slice(&text).map_err(|error| Error::io(path, std::io::Error::other(error)))?;
        let Weights { router, experts } = weights;
        let fits = router.len() == shape.router_width * shape.expert.features && experts.len() == shape.experts * shape.expert.parameters();
        let net = Net { shape, router, experts };
        if fits { Ok(Self { net, estimator }) } else { Err(Error::io(path, std::io::Error::other("is a net of other sizes"))) }
    }

    /// Writes the weights of a trained net.
    pub fn write(net: &Net, path: &Path) -> Result<()> {
        let weights = Weights { router: net.router.clone(), experts: net.experts.clone() };
        durable::write_json(path, &weights)
    }

    /// Starts a student from the teacher: its experts, and its router where one learns that has the teacher's outputs.
    ///
    /// A frozen random router stays random; further outputs (learned noise) stay 0; a router whose outputs are no logits
    /// (DSelect-k) begins anew. Under [`Route::Oracle`] the experts are put in the order of the regions of `rows` that the
    /// teacher gives them, so that the best route leads to the experts that are at home there.
    pub fn copy_to(&self, student: &mut Net, route: Route, estimator: &Estimator, rows: &Batch) {
        student.experts.clone_from(&self.net.experts);
        if route == Route::Oracle {
            let size = self.net.shape.expert.parameters();
            for (place, expert) in student.experts.chunks_exact_mut(size).zip(self.order(rows)) {
                place.copy_from_slice(self.net.expert(expert));
            }
        }
        let logits = !matches!(estimator.relaxation, Relaxation::SmoothStep { .. });
        if logits && matches!(route, Route::Learned | Route::ExpertsAfter { .. } | Route::Untouched) {
            student.router.iter_mut().zip(&self.net.router).for_each(|(w, teacher)| *w = *teacher);
        }
    }

    /// Its forward under its own soft routing.
    pub fn forward(&self, batch: &Batch) -> Forward {
        let means = Means::new(self.net.shape.experts, self.net.shape.expert.outputs);
        self.net.forward(&batch.x, &self.route(batch, &self.estimator), self.estimator.combine, &means)
    }

    /// Probabilities of its experts `[T, E]`, by which it mixes them.
    pub fn router(&self, batch: &Batch) -> Vec<f64> {
        self.route(batch, &self.estimator).relaxed().to_vec()
    }

    fn route(&self, batch: &Batch, estimator: &Estimator) -> RoutedBatch {
        let z = router_outputs(&self.net, Route::Learned, batch, &batch.x);
        estimator.route(&z, self.net.shape.experts, &StepContext::evaluate(Draw::new(0, 0, 0)))
    }

    /// The expert that is most at home in each region, `[E]`: a permutation.
    fn order(&self, batch: &Batch) -> Vec<usize> {
        let hard = self.route(batch, &self.estimator.hard(1));
        permutation(&confusion(&hard, batch).matching().unwrap_or_default(), self.net.shape.experts)
    }
}

/// `places` with those filled in that have no expert, lowest first, for `experts` places.
pub(super) fn permutation(places: &[Option<usize>], experts: usize) -> Vec<usize> {
    let mut left = (0..experts).filter(|expert| !places.contains(&Some(*expert)));
    (0..experts).filter_map(|place| places.get(place).copied().flatten().or_else(|| left.next())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{
        arm::Arm,
        expert::ExpertShape,
        spec::{Size, TaskName},
        task,
    };
    use crate::moe::estimator::{EstimatorSpec, Purpose};

    #[test]
    fn the_oracle_of_tuning_starts_where_the_teacher_is_best() {
        let size = Size { steps: 1, batch: 1, test: 512, points: 0, rate: 0.0 };
        let task = task::open(TaskName::Equal, 5, size).expect("a task of the small net");
        let expert = ExpertShape { features: task.features(), hidden: 0, outputs: task.outputs() };
        let shape = Shape { experts: 8, router_width: 8, expert };
        // A teacher whose expert 7 - r is at home in region r.
        let mut net = Net::new(shape, 1, &[0.0; 8]);
        let optimal = task.optimal_router().expect("there is one");
        let rows = optimal.chunks_exact(task.features()).rev();
        net.router = rows.flatten().copied().collect();
        let estimator = EstimatorSpec::new(&Arm::teacher().estimator, 8, 1, Purpose::Laboratory).expect("sound").at(0, 1);
        let teacher = Teacher { net: net.clone(), estimator };
        let mut student = Net::new(shape, 2, &[0.0; 8]);
        teacher.copy_to(&mut student, Route::Oracle, &estimator, task.test());
        for region in 0..8 {
            assert_eq!(student.expert(region), net.expert(7 - region), "{region}");
        }
        teacher.copy_to(&mut student, Route::Hash, &estimator, task.test());
        assert_eq!(student.experts, net.experts);
    }

    #[test]
    fn places_without_an_expert_take_what_is_left() {
        assert_eq!(permutation(&[Some(2), None, Some(0)], 4), [2, 1, 0, 3]);
        assert_eq!(permutation(&[], 2), [0, 1]);
    }
}
