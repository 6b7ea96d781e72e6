//! What is compared: an estimator with its losses and helpers, or a control.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::spec::Mode;
use crate::{
    error::{Error, Result},
    moe::{
        capacity::Capacity,
        estimator::{EstimatorConfig, Purpose},
        explore::Exploration,
        loss::AuxLoss,
    },
    schedule::{MOST, Schedule},
    train::{
        routing::{ExploreConfig, RoutingConfig, RoutingPlan, RunShape},
        trainable::Learning,
    },
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

    /// How its router is trained, as `hardmax train` would be told.
    pub fn routing(&self, router_rate: f64) -> RoutingConfig {
        // 0 is none; everything else, be it nonsense, is checked.
        let some = |rate: f64| (rate != 0.0).then(|| Schedule::constant(rate));
        RoutingConfig {
            estimator: self.estimator.name.clone(),
            k: self.estimator.k,
            serve_k: 1,
            losses: self.losses.clone(),
            bias_rate: self.bias_rate,
            capacity: self.capacity,
            explore: ExploreConfig { jitter: some(self.jitter), epsilon: some(self.explore.epsilon), dropout: some(self.explore.dropout) },
            remedies: self.remedies.clone(),
            train: if self.route == Route::Learned { Learning::All } else { Learning::Experts },
            router_rate,
            params: self.estimator.params.clone(),
        }
    }

    /// Everything that can be wrong with an arm, for layers of `experts` and a run of `steps`. What `hardmax train` would
    /// refuse of the same settings is refused here too.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on the setting, its path from the arm.
    pub fn check(&self, experts: usize, steps: usize, mode: Mode) -> Result<RoutingPlan> {
        let run = RunShape { experts, steps, purpose: Purpose::Laboratory, teacher: mode == Mode::Tune };
        let plan = self.routing(1.0).plan(run).map_err(from_the_arm)?;
        let bad = |field: &str, message: String| Err(Error::invalid(field, message));
        if let Route::ExpertsAfter { share } = self.route
            && !(0.0..1.0).contains(&share)
        {
            return bad("route.experts_after.share", "must be at least 0 and below 1".into());
        }
        if self.route.is_control() && (self.changes_choice() || !self.losses.is_empty()) {
            let message = "a control has no learning router: losses, bias, noise, capacity and remedies have no place in it";
            return bad("route", message.into());
        }
        let own_router = matches!(self.route, Route::Learned | Route::Frozen | Route::Untouched);
        if !own_router && plan.estimator(0).router_width(experts) != experts {
            let message = format!(
                "a router with one logit for each expert takes part, and {} reads other outputs: only learned, frozen and untouched go \
                 with it",
                self.estimator.name
            );
            return bad("route", message);
        }
        if !(0.0..=MOST).contains(&self.distill) {
            return bad("distill", format!("must be at least 0 and at most {MOST:e}"));
        }
        if self.distill > 0.0 && (mode == Mode::Scratch || self.route == Route::Untouched) {
            return bad("distill", "needs a teacher and something that learns from it: tuning, and another route than untouched".into());
        }
        Ok(plan)
    }

    /// Whether something besides the estimator changes what training chooses, so that its gradient is not that of the
    /// estimator alone.
    pub fn changes_choice(&self) -> bool {
        let noise = self.jitter != 0.0 || self.explore != Exploration::NONE;
        noise || self.bias_rate != 0.0 || self.capacity.is_some() || !self.remedies.is_empty()
    }
}

/// An error on a setting of `[routing]` with the place of that setting in an arm: beside the estimator, whose own settings
/// stay `routing.NAME`.
fn from_the_arm(error: Error) -> Error {
    let Error::InvalidArgument { field, message } = error else { return error };
    let beside = ["losses.", "bias_rate", "capacity", "explore.", "remedies"];
    let field = match field.strip_prefix("routing.") {
        Some("explore.jitter") => "jitter".to_owned(),
        Some(own) if beside.iter().any(|name| own.starts_with(name)) => own.to_owned(),
        _ => field,
    };
    Error::InvalidArgument { field, message }
}
