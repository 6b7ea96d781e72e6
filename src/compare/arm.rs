//! What is compared: an estimator with its losses and helpers, or a control.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    moe::{capacity::Capacity, estimator::EstimatorConfig, explore::Exploration},
    schedule::Schedule,
};

/// One row of the tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Name in tables and files; unique within task and mode.
    pub name: String,
    /// How it routes and differentiates.
    pub estimator: EstimatorConfig,
    /// Who decides the route, and whether the router learns.
    #[serde(default)]
    pub route: Route,
    /// Auxiliary losses and their weights.
    #[serde(default)]
    pub losses: BTreeMap<String, Schedule>,
    /// Rate of loss-free bias balancing; 0: none.
    #[serde(default)]
    pub bias_rate: f64,
    /// Width of the noise on the router's copy of the features.
    #[serde(default)]
    pub jitter: f64,
    /// Random choices and hidden experts.
    #[serde(default)]
    pub explore: Exploration,
    /// Limit of rows per expert in training.
    #[serde(default)]
    pub capacity: Option<Capacity>,
    /// Remedies against collapse that may act.
    #[serde(default)]
    pub remedies: Vec<String>,
    /// In tuning: weight of staying near the teacher's outputs.
    #[serde(default)]
    pub distill: f64,
}

/// Who decides the route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The router, which learns.
    #[default]
    Learned,
    /// A random router that stays as it is, also in tuning.
    Frozen,
    /// A hash of the token; no router.
    Hash,
    /// The optimum; no router.
    Oracle,
    /// Only experts are tuned: soft routing trains everything for this share of the steps (0 in tuning, which has the
    /// teacher's router), then the router is frozen and experts learn under hard routing.
    ExpertsAfter {
        /// Share of the steps.
        share: f64,
    },
}

impl Route {
    /// Whether the arm is a control and no estimator.
    pub fn is_control(self) -> bool {
        self != Self::Learned
    }

    /// Whether the router takes part at all; otherwise top-2 has no meaning.
    pub fn has_router(self) -> bool {
        !matches!(self, Self::Hash | Self::Oracle)
    }
}

impl Arm {
    /// An estimator with nothing else.
    pub fn new(name: impl Into<String>, estimator: EstimatorConfig) -> Self {
        Self {
            name: name.into(),
            estimator,
            route: Route::Learned,
            losses: BTreeMap::new(),
            bias_rate: 0.0,
            jitter: 0.0,
            explore: Exploration::NONE,
            capacity: None,
            remedies: Vec::new(),
            distill: 0.0,
        }
    }

    /// The model that [`super::spec::Mode::Tune`] starts from: soft routing at temperature 1.
    pub fn teacher() -> Self {
        Self::new("teacher", EstimatorConfig { name: "soft".into(), k: None, params: BTreeMap::new() })
    }
}
