//! The soft-trained net that tuning starts from: kept in a file, copied into the student, run for its outputs.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    arm::Route,
    net::{Means, Net, Shape},
    step::router_outputs,
    task::Batch,
};
use crate::{
    error::{Error, Result},
    moe::{
        draw::Draw,
        estimator::{Estimator, Relaxation, StepContext},
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
        super::files::write_json(path, &weights)
    }

    /// Starts a student from the teacher: its experts, and its router where one learns that has the teacher's outputs.
    ///
    /// A frozen random router stays random; further outputs (learned noise) stay 0; a router whose outputs are no logits
    /// (DSelect-k) begins anew.
    pub fn copy_to(&self, student: &mut Net, route: Route, estimator: &Estimator) {
        student.experts.clone_from(&self.net.experts);
        let logits = !matches!(estimator.relaxation, Relaxation::SmoothStep { .. });
        if logits && matches!(route, Route::Learned | Route::ExpertsAfter { .. } | Route::Untouched) {
            student.router.iter_mut().zip(&self.net.router).for_each(|(w, teacher)| *w = *teacher);
        }
    }

    /// Its outputs `[T, O]` under its own soft routing.
    pub fn outputs(&self, batch: &Batch) -> Vec<f64> {
        let z = router_outputs(&self.net, Route::Learned, batch, &batch.x);
        let routed = self.estimator.route(&z, self.net.shape.experts, &StepContext::evaluate(Draw::new(0, 0, 0)));
        let means = Means::new(self.net.shape.experts, self.net.shape.expert.outputs);
        self.net.forward(&batch.x, &routed, self.estimator.combine, &means).y
    }
}
