//! A run, checked against the model that it is for: everything that can be wrong is found before anything is made.

use std::sync::Arc;

use super::{
    config::{TuneConfig, TuneRun},
    evaluate::Routed,
    select::Selection,
};
use crate::{
    error::{Error, Result},
    fidelity::case::Case,
    model::{ModelSpec, ReferenceRouting, weights::ModelWeights},
    moe::{
        estimator::{Estimator, Gradient, Purpose},
        loss::AuxLoss,
        policy::RoutingChoice,
    },
    train::{
        config::{MAX_TOKENS, OptimizerConfig},
        routing::{ExploreConfig, RoutingConfig, RoutingPlan, RunShape},
        trainable::Learning,
    },
};

/// Tokens of a window unless stated, where the context is longer.
const WINDOW: usize = 512;

/// A checked [`TuneConfig`].
#[derive(Clone, Debug)]
pub struct TunePlan {
    /// What learns.
    pub selection: Selection,
    /// How routers learn.
    pub routing: RoutingPlan,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Learning rate of experts over that of the rest.
    pub expert_rate: f64,
    /// Tokens of a window.
    pub window: usize,
    /// What the model is to be true to.
    pub reference: RoutingChoice,
    /// The checkpoint does not say what it was trained under: the reference is a guess.
    pub assumed: bool,
    /// Of the reference, where it is a soft one; else 1.
    pub temperature: f64,
    /// By decoder layer, for those with experts whose router does not learn: the serving routing.
    pub served: Arc<[Option<Estimator>]>,
    /// The reference as what all others are measured against.
    pub reference_case: Case,
    /// What is evaluated: the serving routing, and top-1 and top-2 where they are others.
    pub routed: Vec<Routed>,
}

impl TuneConfig {
    /// Checks everything that does not depend on text.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field; `FailedPrecondition` for a model that cannot be tuned.
    pub fn plan(&self, spec: &ModelSpec, weights: &ModelWeights) -> Result<TunePlan> {
        let selection = self.target.select(spec, weights)?;
        let (run, optimizer) = (&self.run, self.optimizer.adam(self.run.steps));
        let window = run.check(spec)?;
        optimizer.check("optimizer", run.steps)?;
        positive("optimizer.expert_rate", self.optimizer.expert_rate)?;
        if let Some(distill) = self.distill {
            positive("distill.weight", distill.weight)?;
            ensure(distill.lm_weight >= 0.0 && distill.lm_weight.is_finite(), "distill.lm_weight", "must be at least 0")?;
        }
        if let Some(stop) = self.stop {
            ensure(stop.patience > 0, "stop.patience", "must be above 0")?;
            ensure(stop.min_change >= 0.0 && stop.min_change.is_finite(), "stop.min_change", "must be at least 0")?;
        }
        let (reference, assumed) = self.reference(spec)?;
        let serving = choice("run.serving", run.serving.as_deref(), spec)?.unwrap_or_default();
        let routing = self.routing_plan(spec)?;
        run.check_step(window, routing.estimator(0).copies())?;
        Ok(TunePlan {
            routing,
            served: served(spec, &selection, serving)?,
            reference_case: reference.into(),
            routed: routed(spec, serving)?,
            temperature: match reference {
                RoutingChoice::Soft { temperature: Some(temperature) } => f64::from(temperature),
                _ => 1.0,
            },
            expert_rate: self.optimizer.expert_rate,
            selection,
            optimizer,
            window,
            reference,
            assumed,
        })
    }

    fn routing_plan(&self, spec: &ModelSpec) -> Result<RoutingPlan> {
        if self.distill.is_none() && self.routing.losses.contains_key(AuxLoss::RouterKl.id()) {
            let message = "keeps routers near those of a teacher, and there is none: set distill.weight, or leave it out";
            return Err(Error::invalid("routing.losses.router_kl", message));
        }
        let experts = spec.moe_layers().map(|(_, moe)| moe.num_experts).min();
        let experts = experts.ok_or_else(|| Error::FailedPrecondition("the model has no routed layer: there is no gap to close".into()))?;
        let routing = RoutingConfig {
            estimator: self.routing.estimator.clone(),
            k: self.routing.k,
            serve_k: 1,
            losses: self.routing.losses.clone(),
            bias_rate: 0.0,
            capacity: None,
            explore: ExploreConfig::default(),
            remedies: Vec::new(),
            train: Learning::All,
            router_rate: self.optimizer.router_rate,
            params: self.routing.params(),
        };
        let shape = RunShape { experts, steps: self.run.steps, purpose: Purpose::Train, teacher: self.distill.is_some() };
        let plan = routing.plan(shape).map_err(|error| error.rooted("routing.router_rate", "optimizer.router_rate"))?;
        let width = plan.estimator(0).router_width(experts);
        let message = format!("{} needs {width} router outputs for {experts} experts, which no checkpoint has", self.routing.estimator);
        ensure(width == experts, "routing.estimator", &message)?;
        let of_labels = self.distill.is_some() && matches!(plan.estimator(0).gradient, Gradient::Score { .. });
        let message =
            format!("{} learns from the losses of its draws on the text, a teacher would not reach routers", self.routing.estimator);
        ensure(!of_labels, "distill.weight", &message)?;
        Ok(plan)
    }

    /// The reference, at its temperature, and whether it is a guess.
    fn reference(&self, spec: &ModelSpec) -> Result<(RoutingChoice, bool)> {
        if let Some(reference) = choice("run.reference", self.run.reference.as_deref(), spec)? {
            let told = match reference {
                RoutingChoice::Soft { temperature: None } => match spec.reference {
                    ReferenceRouting::Soft { temperature } => RoutingChoice::Soft { temperature: Some(temperature) },
                    ReferenceRouting::OwnTopK { .. } | ReferenceRouting::TopK { .. } => RoutingChoice::Soft { temperature: Some(1.0) },
                },
                other => other,
            };
            return Ok((told, false));
        }
        Ok(match spec.reference {
            ReferenceRouting::OwnTopK { assumed: true } => (RoutingChoice::Soft { temperature: Some(1.0) }, true),
            known => (known.choice(), false),
        })
    }
}

impl TuneRun {
    /// A step's text, of which a score function runs several copies.
    fn check_step(&self, window: usize, copies: usize) -> Result<()> {
        let tokens = self.windows.saturating_mul(window).saturating_mul(copies);
        ensure(tokens <= MAX_TOKENS, "run.windows", &format!("make {tokens} tokens a step: at most {MAX_TOKENS}"))
    }

    /// The tokens of a window.
    fn check(&self, spec: &ModelSpec) -> Result<usize> {
        for (field, number) in [
            ("run.steps", self.steps),
            ("run.windows", self.windows),
            ("run.micro_windows", self.micro_windows),
            ("run.eval_every", self.eval_every),
            ("run.save_every", self.save_every),
            ("run.skip_limit", self.skip_limit),
        ] {
            ensure(number > 0, field, "must be above 0")?;
        }
        let divides = self.windows.is_multiple_of(self.micro_windows);
        ensure(divides, "run.micro_windows", &format!("must divide run.windows, {}", self.windows))?;
        ensure(self.eval_tokens >= 2, "run.eval_tokens", "must be at least 2: the second is the first to be predicted")?;
        ensure(self.heldout_share > 0.0 && self.heldout_share <= 0.5, "run.heldout_share", "must be above 0 and at most 0.5")?;
        self.max_seconds.map_or(Ok(()), |seconds| positive("run.max_seconds", seconds))?;
        let window = self.window_tokens.unwrap_or(spec.max_context.min(WINDOW));
        let fits = (2..=spec.max_context).contains(&window);
        ensure(fits, "run.window_tokens", &format!("must be from 2 to {}, the context of the model", spec.max_context))?;
        Ok(window)
    }
}

fn ensure(good: bool, field: &str, message: &str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::invalid(field, message)) }
}

fn positive(field: &str, number: f64) -> Result<()> {
    ensure(number > 0.0 && number.is_finite(), field, "must be above 0")
}

fn choice(field: &str, text: Option<&str>, spec: &ModelSpec) -> Result<Option<RoutingChoice>> {
    let Some(text) = text else { return Ok(None) };
    let checked = text.parse().and_then(|choice: RoutingChoice| spec.check_routing(&choice.into()).map(|()| choice));
    checked.map(Some).map_err(|error| Error::invalid(field, format!("{text}: {error}")))
}

/// What layers route by whose router does not learn: as they will be served.
fn served(spec: &ModelSpec, selection: &Selection, serving: RoutingChoice) -> Result<Arc<[Option<Estimator>]>> {
    let mut served = vec![None; spec.layers.len()];
    for (layer, moe) in spec.moe_layers().filter(|(layer, _)| selection.frozen_routers.contains(layer)) {
        served[layer] = Some(moe.resolve(serving, spec.reference)?.estimator());
    }
    Ok(served.into())
}

fn routed(spec: &ModelSpec, serving: RoutingChoice) -> Result<Vec<Routed>> {
    let mut routed = vec![Routed { case: serving.into(), k: None }];
    for k in [1, 2].into_iter().filter(|&k| spec.moe_layers().all(|(_, moe)| k <= moe.num_experts)) {
        let hard = Case::from(RoutingChoice::TopK { k, weight_form: None });
        match routed[0].case.policies(spec)? == hard.policies(spec)? {
            true => routed[0].k = Some(k),
            false => routed.push(Routed { case: hard, k: Some(k) }),
        }
    }
    Ok(routed)
}
