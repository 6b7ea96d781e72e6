//! How the router of a run is trained: the `[routing]` table of a recipe, and the same checked and ready for use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::trainable::Learning;
use crate::{
    error::{Error, Result},
    model::ReferenceRouting,
    moe::{
        TrainState,
        capacity::Capacity,
        estimator::{ChoiceChange, Estimator, EstimatorConfig, EstimatorSpec, Param, Purpose, Regulariser, Relaxation},
        explore::Exploration,
        loss::{AuxLoss, LossContext, LossTerm, loss_terms},
        policy::WeightForm,
        remedy::{CAP, Remedies, Remedy},
    },
    schedule::{MOST, Schedule, Shape},
};

/// Routing under training and serving. Keys that are none of these fields are parameters of the estimator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingConfig {
    /// A row of the catalogue.
    pub estimator: String,
    /// Experts per token in training, where the estimator has a choice; left out: its default.
    #[serde(default)]
    pub k: Option<usize>,
    /// Experts per token that the checkpoint is served with: 1 or 2.
    pub serve_k: usize,
    /// Weights of auxiliary losses by name, each the mean over layers. With a weight of 0 a loss is only recorded.
    #[serde(default)]
    pub losses: BTreeMap<String, Schedule>,
    /// Rate of loss-free balancing: how far the selection bias of an expert moves in a step.
    ///
    /// A checkpoint in the layout of Mixtral has no place for the bias, so evaluation and serving are without it. It moves
    /// over the first six tenths of the run, then fades, and is 0 in the last tenth: routers and experts end their training
    /// under the choice that is served.
    #[serde(default)]
    pub bias_rate: f64,
    /// Most rows of an expert in training; left out: dropless.
    #[serde(default)]
    pub capacity: Option<Capacity>,
    /// Random changes of the choice.
    #[serde(default)]
    pub explore: ExploreConfig,
    /// What may be done against dead experts.
    #[serde(default)]
    pub remedies: Vec<String>,
    /// What learns.
    #[serde(default)]
    pub train: Learning,
    /// Learning rate of routers over that of the rest.
    #[serde(default = "one")]
    pub router_rate: f64,
    /// Parameters of the estimator by name.
    #[serde(flatten)]
    pub params: BTreeMap<String, Param>,
}

fn one() -> f64 {
    1.0
}

/// Exploration over a run. Left out: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExploreConfig {
    /// Half-width of the noise that the router's input is multiplied by, below 1.
    pub jitter: Option<Schedule>,
    /// Probability that a token's experts are drawn evenly instead of chosen, below 1.
    pub epsilon: Option<Schedule>,
    /// Probability that an expert is hidden from a token, below 1.
    pub dropout: Option<Schedule>,
}

/// What a run offers and asks for.
#[derive(Clone, Copy, Debug)]
pub struct RunShape {
    /// Experts per layer.
    pub experts: usize,
    /// Optimizer steps.
    pub steps: usize,
    /// Whether the result is to be served, or compared.
    pub purpose: Purpose,
    /// Whether there is a teacher with a router.
    pub teacher: bool,
}

/// A checked [`RoutingConfig`].
#[derive(Clone, Debug)]
pub struct RoutingPlan {
    /// How routers learn.
    pub estimator: EstimatorSpec,
    /// Auxiliary losses.
    pub losses: Vec<LossTerm>,
    /// Exploration.
    pub explore: ExploreConfig,
    /// Limit of rows per expert.
    pub capacity: Option<Capacity>,
    /// Rate of loss-free balancing; 0 is none.
    pub bias_rate: f64,
    /// Share of a selection bias that is in force.
    pub bias_share: Schedule,
    /// What may be done against dead experts.
    pub remedies: Remedies,
    /// What learns.
    pub learning: Learning,
    /// Learning rate of routers over that of the rest.
    pub router_rate: f64,
    /// Optimizer steps of the run: where schedules end.
    pub steps: usize,
}

impl RoutingConfig {
    /// The estimator's part.
    pub fn estimator(&self) -> EstimatorConfig {
        EstimatorConfig { name: self.estimator.clone(), k: self.k, params: self.params.clone() }
    }

    /// Checks everything that does not depend on data.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field, `routing...`.
    pub fn plan(&self, run: RunShape) -> Result<RoutingPlan> {
        let estimator = EstimatorSpec::new(&self.estimator(), run.experts, run.steps, run.purpose)?;
        if run.purpose == Purpose::Train {
            self.check_effects(run.teacher)?;
            self.check_served(&estimator.at(run.steps, run.steps))?;
        }
        let first = estimator.at(0, run.steps);
        let context = LossContext { steps: run.steps, estimator: &estimator, teacher: run.teacher };
        let losses = loss_terms("routing.losses", &self.losses, context)?;
        let balanced = losses.iter().any(|term| term.loss.balances() && term.weight.init.max(term.weight.end) > 0.0);
        let remedies = Remedies::new("routing.remedies", &self.remedies, balanced)?;
        let at_cap = losses.iter().find(|term| term.loss.balances() && term.weight.least() >= CAP);
        if let (true, Some(term)) = (remedies.has(Remedy::RaiseBalance), at_cap) {
            let message =
                format!("'raise_balance' has no effect because it raises up to {CAP}, which {} has already; remove it", term.loss);
            return Err(Error::invalid("routing.remedies", message));
        }

        let ensure = |good: bool, field: &str, message: &str| if good { Ok(()) } else { Err(Error::invalid(field, message)) };
        ensure((1..=2).contains(&self.serve_k), "routing.serve_k", "must be 1 or 2")?;
        ensure(self.serve_k <= run.experts, "routing.serve_k", "is more than the experts")?;
        let rates = format!("0 and at most {MOST:e}");
        ensure((0.0..=MOST).contains(&self.bias_rate), "routing.bias_rate", &format!("must be at least {rates}"))?;
        ensure(self.router_rate > 0.0 && self.router_rate <= MOST, "routing.router_rate", &format!("must be above {rates}"))?;
        let chooses = "needs an estimator that chooses a fixed number of experts by largest score";
        ensure(self.bias_rate == 0.0 || first.chooses_top_k(), "routing.bias_rate", chooses)?;
        ensure(!remedies.has(Remedy::BiasBump) || first.chooses_top_k(), "routing.remedies", &format!("'bias_bump' {chooses}"))?;
        ensure(
            !remedies.has(Remedy::Reinit) || (self.train == Learning::All && first.router_width(run.experts) == run.experts),
            "routing.remedies",
            "'reinit' needs routers and experts that learn, and a router row for each expert",
        )?;
        ensure(self.capacity.is_none() || first.chooses_top_k(), "routing.capacity", chooses)?;
        if let Some(capacity) = self.capacity {
            capacity.check("routing.capacity")?;
        }
        self.explore.check(run.steps)?;
        ensure(self.explore.epsilon.is_none() || first.chooses_top_k(), "routing.explore.epsilon", chooses)?;
        for (changed, change, field) in [
            (self.bias_rate > 0.0, ChoiceChange::Bias, "routing.bias_rate"),
            (remedies.has(Remedy::BiasBump), ChoiceChange::Bias, "routing.remedies"),
            (self.explore.epsilon.is_some(), ChoiceChange::Epsilon, "routing.explore.epsilon"),
            (self.explore.dropout.is_some(), ChoiceChange::Dropout, "routing.explore.dropout"),
        ] {
            if changed {
                estimator.check_choice(change, field)?;
            }
        }
        Ok(RoutingPlan {
            estimator,
            losses,
            explore: self.explore,
            capacity: self.capacity,
            bias_rate: self.bias_rate,
            bias_share: bias_share(run.purpose),
            remedies,
            learning: self.train,
            router_rate: self.router_rate,
            steps: run.steps,
        })
    }

    /// Checks that a checkpoint can hold what is trained, `last` being the estimator at the end of it.
    fn check_served(&self, last: &Estimator) -> Result<()> {
        let one = self.serve_k == 1 && last.serve != WeightForm::Raw;
        if matches!(last.relaxation, Relaxation::Softmax { .. }) || last.serve == WeightForm::Unit || one {
            return Ok(());
        }
        let message = format!("a checkpoint weighs experts by the softmax, {} does not: serve it with 1", self.estimator);
        Err(Error::invalid("routing.serve_k", message))
    }

    /// Refuses what would change nothing about what is trained and served.
    fn check_effects(&self, teacher: bool) -> Result<()> {
        let refuse = |field: &str, message: String| Err(Error::invalid(format!("routing.{field}"), message));
        if !teacher && self.losses.contains_key(AuxLoss::RouterKl.id()) {
            let message = "needs a teacher, and `hardmax train` has none: it starts from random weights; remove it. \
                           `hardmax compare --modes tune` starts from a soft teacher, and keeps near its outputs with `distill`";
            return refuse("losses.router_kl", message.into());
        }
        if self.train != Learning::Experts {
            return Ok(());
        }
        let frozen = "because train = \"experts\" keeps routers as they are";
        if self.router_rate != 1.0 {
            return refuse("router_rate", format!("has no effect {frozen}; remove it"));
        }
        if self.bias_rate > 0.0 {
            return refuse("bias_rate", format!("has no effect on what is served {frozen}, and the bias is not served; remove it"));
        }
        if self.remedies.iter().any(|remedy| remedy == Remedy::BiasBump.id()) {
            let message = format!("'bias_bump' has no effect on what is served {frozen}, and the bias is not served; remove it");
            return refuse("remedies", message);
        }
        Ok(())
    }
}

/// A checkpoint cannot hold the bias: in a run for one it is gone before the end. The laboratory measures with it.
fn bias_share(purpose: Purpose) -> Schedule {
    match purpose {
        Purpose::Train => Schedule { hold_start: 0.6, ..Schedule::new(Shape::Linear, 1.0, 0.0) },
        Purpose::Laboratory => Schedule::constant(1.0),
    }
}

impl ExploreConfig {
    fn check(&self, steps: usize) -> Result<()> {
        for (name, schedule) in [("jitter", self.jitter), ("epsilon", self.epsilon), ("dropout", self.dropout)] {
            let Some(schedule) = schedule else { continue };
            let field = format!("routing.explore.{name}");
            if let Some(problem) = schedule.problem(false, steps) {
                return Err(Error::invalid(field, problem));
            }
            if schedule.init.max(schedule.last()) >= 1.0 {
                return Err(Error::invalid(field, "must be at least 0 and below 1"));
            }
        }
        Ok(())
    }

    fn at(schedule: Option<Schedule>, step: usize, steps: usize) -> f64 {
        schedule.map_or(0.0, |schedule| schedule.at(step, steps))
    }
}

impl RoutingPlan {
    /// The estimator in force at a step.
    pub fn estimator(&self, step: usize) -> Estimator {
        self.estimator.at(step, self.steps)
    }

    /// What the estimator adds to the loss at a step by its own definition.
    pub fn regulariser(&self, step: usize) -> Regulariser {
        self.estimator.regulariser(step, self.steps)
    }

    /// What hardens over the run: temperature or width of the relaxation; 1 for estimators that have neither.
    pub fn sharpness(&self, step: usize) -> f64 {
        let number = |name| self.estimator.number_at(name, step, self.steps);
        number("temperature").or_else(|| number("width")).unwrap_or(1.0)
    }

    /// What a router is divided by when saved, so that the softmax it was trained under is the plain one.
    pub fn folding(&self, step: usize) -> f64 {
        self.estimator(step).folding()
    }

    /// The routing that the saved model is compared with: the mixture that was trained, where it is one of the softmax,
    /// else hard routing to as many experts as in training.
    pub fn reference(&self, serve_k: usize) -> ReferenceRouting {
        self.estimator(self.steps).reference(serve_k)
    }

    /// Puts what the plan says about `step` into the state of the forward.
    pub fn prepare(&self, state: &mut TrainState, step: usize) {
        state.step = step;
        state.capacity = self.capacity;
        state.jitter = self.jitter(step);
        state.explore = self.exploration(step);
    }

    /// Half-width of the noise on the router's input at a step; 0 is none.
    pub fn jitter(&self, step: usize) -> f64 {
        ExploreConfig::at(self.explore.jitter, step, self.steps)
    }

    /// Random changes of the choice at a step.
    pub fn exploration(&self, step: usize) -> Exploration {
        let at = |schedule| ExploreConfig::at(schedule, step, self.steps);
        Exploration { epsilon: at(self.explore.epsilon), dropout: at(self.explore.dropout) }
    }

    /// Whether anything gives experts a selection bias.
    pub fn has_bias(&self) -> bool {
        self.bias_rate > 0.0 || self.remedies.has(Remedy::BiasBump)
    }

    /// Share of a selection bias that is in force at a step.
    pub fn bias_share(&self, step: usize) -> f64 {
        self.bias_share.at(step, self.steps)
    }

    /// Remedies that may act after a step: no bias is raised that the next step would not have.
    pub fn remedies(&self, step: usize) -> Remedies {
        if self.bias_share(step + 1) > 0.0 { self.remedies.clone() } else { self.remedies.without(Remedy::BiasBump) }
    }

    /// The balance loss with the largest weight at a step, and that weight.
    pub fn balance(&self, step: usize) -> Option<(AuxLoss, f64)> {
        let weights = self.losses.iter().filter(|term| term.loss.balances()).map(|term| (term.loss, term.weight.at(step, self.steps)));
        weights.reduce(|best, next| if next.1 > best.1 { next } else { best })
    }
}
