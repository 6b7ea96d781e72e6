//! What is compared: an estimator with its losses and helpers, or a control.

use serde::{Deserialize, Serialize};

use crate::moe::estimator::EstimatorConfig;

/// One row of the tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Name in tables and files; unique within task and mode. Lower case letters, digits, `_` and `+`.
    pub name: String,
    /// How it routes and differentiates.
    pub estimator: EstimatorConfig,
    /// Who decides the route, and whether the router learns.
    pub route: Route,
}

/// Who decides the route.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The router, which learns.
    Learned,
    /// The router as it is at the start: random from scratch, also in tuning.
    Frozen,
    /// A hash of the token; no router.
    Hash,
    /// The optimum; no router.
    Oracle,
    /// Only experts are tuned: soft routing trains everything for this share of the steps (0 in tuning: the teacher's router),
    /// then the router is frozen and experts learn under hard routing.
    ExpertsAfter {
        /// Share of the steps.
        share: f64,
    },
}

impl Arm {
    /// The model that [`super::spec::Mode::Tune`] starts from: soft routing at temperature 1.
    pub fn teacher() -> Self {
        Self {
            name: "teacher".into(),
            estimator: EstimatorConfig { name: "soft".into(), k: None, params: Default::default() },
            route: Route::Learned,
        }
    }
}
