//! What is compared: an estimator with its losses and helpers, or a control.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::spec::Mode;
use crate::{
    error::{Error, Result},
    moe::{
        capacity::Capacity,
        estimator::{ChoiceChange, EstimatorConfig, EstimatorSpec, Purpose},
        explore::Exploration,
        loss::{AuxLoss, LossContext, LossTerm, loss_terms},
        remedy::{Remedies, Remedy},
    },
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
    /// Nothing is trained at all: in tuning, the teacher as it is.
    Untouched,
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

    /// Whether its tuning reads the teacher's routers.
    pub fn follows_router(&self) -> bool {
        self.losses.contains_key(AuxLoss::RouterKl.id())
    }

    /// Whether something besides the estimator changes what experts training chooses, so that its gradient is not that of
    /// the estimator alone.
    pub fn changes_choice(&self) -> bool {
        let explores = self.explore.epsilon > 0.0 || self.explore.dropout > 0.0 || self.jitter > 0.0;
        explores || self.bias_rate > 0.0 || self.capacity.is_some() || !self.remedies.is_empty()
    }

    /// Everything that can be wrong with an arm, for layers of `experts` and a run of `steps`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on the setting, its path from the arm.
    pub fn check(&self, experts: usize, steps: usize, mode: Mode) -> Result<CheckedArm> {
        let estimator = EstimatorSpec::new(&self.estimator, experts, steps, Purpose::Laboratory)?;
        let first = estimator.at(0, steps);
        let bad = |field: &str, message: &str| Err(Error::invalid(field, message));
        let context = LossContext { steps, estimator: &estimator, teacher: mode == Mode::Tune };
        let losses = loss_terms("losses", &self.losses, context)?;
        let remedies = Remedies::new("remedies", &self.remedies, losses.iter().any(|term| term.loss.balances()))?;
        self.explore.check("explore")?;
        self.capacity.map_or(Ok(()), |capacity| capacity.check("capacity"))?;
        for (field, value) in [("bias_rate", self.bias_rate), ("jitter", self.jitter), ("distill", self.distill)] {
            if !(value.is_finite() && value >= 0.0) {
                return bad(field, "must be at least 0");
            }
        }
        if let Route::ExpertsAfter { share } = self.route
            && !(0.0..1.0).contains(&share)
        {
            return bad("route.experts_after.share", "must be at least 0 and below 1");
        }
        let balances = self.bias_rate > 0.0 || self.capacity.is_some() || self.explore.epsilon > 0.0 || !remedies.is_empty();
        if balances && !first.chooses_top_k() {
            return bad("estimator", "does not choose its experts by score: bias, capacity, epsilon and remedies would do nothing");
        }
        if balances && self.route.is_control() {
            return bad("route", "a control has no learning router: bias, capacity, epsilon and remedies have no place in it");
        }
        for (changed, change, field) in [
            (self.bias_rate > 0.0, ChoiceChange::Bias, "bias_rate"),
            (remedies.has(Remedy::BiasBump), ChoiceChange::Bias, "remedies"),
            (self.explore.epsilon > 0.0, ChoiceChange::Epsilon, "explore.epsilon"),
        ] {
            if changed {
                estimator.check_choice(change, field)?;
            }
        }
        Ok(CheckedArm { estimator, losses, remedies })
    }
}

/// An arm's settings, checked.
#[derive(Clone, Debug)]
pub struct CheckedArm {
    /// The estimator with its schedules.
    pub estimator: EstimatorSpec,
    /// Auxiliary losses.
    pub losses: Vec<LossTerm>,
    /// Remedies that may act.
    pub remedies: Remedies,
}
