//! The losses of a recipe: names and weights, checked.

use std::collections::BTreeMap;

use super::AuxLoss;
use crate::{
    error::{Error, Result},
    moe::estimator::{EstimatorSpec, NoiseKind, Relaxation, Selection},
    schedule::Schedule,
};

/// One auxiliary loss of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossTerm {
    /// What is added to the task's loss, mean over layers.
    pub loss: AuxLoss,
    /// Times this, at least 0.
    pub weight: Schedule,
}

/// What a run has to offer to losses.
#[derive(Clone, Copy, Debug)]
pub struct LossContext<'a> {
    /// Updates of the run.
    pub steps: usize,
    /// Whose router outputs and choices they are losses of.
    pub estimator: &'a EstimatorSpec,
    /// Whether there is a teacher with a router.
    pub teacher: bool,
}

/// Checks `{ switch = 0.01, router_z = { init = 1e-3, final = 0.0, schedule = "linear" } }`. `field` is the path of the
/// table, for messages.
///
/// # Errors
/// [`Error::InvalidArgument`] on the loss: an unknown name, a weight that is none, or what the estimator makes
/// meaningless.
pub fn loss_terms(field: &str, losses: &BTreeMap<String, Schedule>, context: LossContext<'_>) -> Result<Vec<LossTerm>> {
    losses.iter().map(|(name, weight)| term(field, name, *weight, context)).collect()
}

fn term(field: &str, name: &str, weight: Schedule, context: LossContext<'_>) -> Result<LossTerm> {
    let Some(loss) = AuxLoss::ALL.into_iter().find(|loss| loss.id() == name) else {
        let known = AuxLoss::ALL.map(AuxLoss::id).join(", ");
        return Err(Error::invalid(format!("{field}.{name}"), format!("is unknown; losses are {known}")));
    };
    let bad = |message: String| Err(Error::invalid(format!("{field}.{name}"), message));
    if weight.init < 0.0 || weight.end < 0.0 {
        return bad("must not be negative".into());
    }
    if let Some(problem) = weight.problem(false, context.steps) {
        return bad(problem);
    }
    let (estimator, method) = (context.estimator.at(0, context.steps), context.estimator.row().name);
    match loss {
        _ if matches!(estimator.relaxation, Relaxation::SmoothStep { .. }) => {
            bad(format!("is a loss on a logit for each expert, and the router of {method} has other outputs: leave it out"))
        }
        _ if loss.counts_choices() && estimator.selection == Selection::All => {
            bad(format!("counts the chosen experts, and {method} chooses all of them: it would be constant; switch and gshard are not"))
        }
        AuxLoss::Load if estimator.noise.kind != NoiseKind::Learned => {
            bad("is the chance to win by noise: it needs an estimator with normal noise on the choice, such as noisy_topk".into())
        }
        AuxLoss::RouterKl if !context.teacher => bad("needs a teacher: a run that tunes a soft-trained checkpoint".into()),
        _ => Ok(LossTerm { loss, weight }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        moe::estimator::{EstimatorConfig, Purpose, catalog::CATALOG},
        schedule::Shape,
    };

    fn estimator(name: &str) -> EstimatorSpec {
        let config = EstimatorConfig { name: name.into(), k: None, params: BTreeMap::new() };
        EstimatorSpec::new(&config, 8, 100, Purpose::Laboratory).unwrap()
    }

    fn read(method: &str, name: &str, weight: Schedule) -> Result<Vec<LossTerm>> {
        let context = LossContext { steps: 100, estimator: &estimator(method), teacher: false };
        loss_terms("routing.losses", &BTreeMap::from([(name.to_owned(), weight)]), context)
    }

    #[test]
    fn every_loss_has_a_name_of_its_own() {
        let context = LossContext { steps: 100, estimator: &estimator("noisy_topk"), teacher: true };
        let all: BTreeMap<String, Schedule> = AuxLoss::ALL.iter().map(|loss| (loss.id().to_owned(), Schedule::constant(0.01))).collect();
        assert_eq!(loss_terms("losses", &all, context).unwrap().len(), AuxLoss::ALL.len());
        let weight = Schedule::new(Shape::Linear, 0.01, 0.0);
        assert_eq!(read("soft", "switch", weight).unwrap(), [LossTerm { loss: AuxLoss::Switch, weight }]);
    }

    #[test]
    fn mistakes_are_named() {
        let late = Schedule { until: Some(101), ..Schedule::new(Shape::Linear, 0.01, 0.0) };
        for (name, weight, message) in [
            ("swich", Schedule::constant(0.1), "routing.losses.swich: is unknown; losses are switch, top_k, hugging_face"),
            ("switch", Schedule::constant(-0.1), "routing.losses.switch: must not be negative"),
            ("switch", Schedule::constant(f64::NAN), "routing.losses.switch: init and final must be finite"),
            ("switch", late, "routing.losses.switch: `until` = 101 is past the end of the run, 100 steps"),
            ("load", Schedule::constant(0.1), "routing.losses.load: is the chance to win by noise"),
            ("router_kl", Schedule::constant(0.1), "routing.losses.router_kl: needs a teacher"),
        ] {
            let error = read("raw_topk", name, weight).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }

    #[test]
    fn a_loss_without_a_gradient_is_refused_with_the_estimator() {
        for row in CATALOG {
            let dense = estimator(row.name).at(0, 100).selection == Selection::All;
            for loss in AuxLoss::ALL.into_iter().filter(|loss| !matches!(loss, AuxLoss::Load | AuxLoss::RouterKl)) {
                let refused = read(row.name, loss.id(), Schedule::constant(0.01)).err().map(|error| error.to_string());
                let message = match (row.name, dense && loss.counts_choices()) {
                    ("dselect_k", _) => {
                        Some("is a loss on a logit for each expert, and the router of dselect_k has other outputs: leave it out".into())
                    }
                    (name, true) => Some(format!(
                        "counts the chosen experts, and {name} chooses all of them: it would be constant; switch and gshard are not"
                    )),
                    (_, false) => None,
                };
                assert_eq!(refused, message.map(|message| format!("routing.losses.{loss}: {message}")), "{}", row.name);
            }
        }
    }
}
