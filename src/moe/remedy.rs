//! Remedies for collapse, as decisions: what to do, to which expert. Doing it belongs to whoever holds the weights.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    collapse::{Health, Monitor},
    draw::{Draw, Stream},
};
use crate::error::{Error, Result};

/// Something a run may do against collapse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Raise the selection bias of a dead expert until it would have had its fair share of the last batch.
    BiasBump,
    /// Make a dead expert anew from the busiest one, with noise.
    Reinit,
    /// Double the weights of the balance losses, up to 0.1.
    RaiseBalance,
}

/// One thing to do now.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// Set the selection bias of an expert. It is to fade afterwards (`balance_bias::fade`), so that the router is
    /// served as it was trained.
    BumpBias {
        /// The dead expert.
        expert: usize,
        /// Its new bias, in units of the selection score.
        to: f64,
    },
    /// Copy weights and router row of `donor` to `expert`, with normal noise ([`renewed`]), and its selection bias
    /// ([`Action::apply_to`]). The optimizer starts anew with the scale of the donor's gradients.
    Reinit {
        /// The dead expert.
        expert: usize,
        /// The busiest expert.
        donor: usize,
        /// Standard deviation of the noise over that of the copied weights.
        noise: f64,
    },
    /// Multiply the weights of this layer's balance losses from now on ([`Treatment::balance_weight`]).
    RaiseBalance {
        /// In force from now on, relative to the recipe.
        factor: f64,
    },
}

/// Balance weights are not raised above this.
pub const CAP: f64 = 0.1;

/// Steps that a remedy is given to work before the same one acts again.
pub const COOLDOWN: usize = 50;

/// Noise of a re-initialised expert: enough to part it from its donor, too little to spoil it.
const REINIT_NOISE: f64 = 0.02;

/// The remedies that a run has turned on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remedies {
    enabled: Vec<Remedy>,
}

/// What remedies have done so far to one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Treatment {
    last: BTreeMap<Remedy, usize>,
    factor: f64,
}

/// What a decision is made on, besides the layer's monitor.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// `[T, E]` of the last batch: [`super::estimator::Preference::scores`].
    pub scores: &'a [f64],
    /// `[E]` selection bias in force; empty is none.
    pub bias: &'a [f64],
    /// The largest weight of a balance loss in force ([`Treatment::balance_weight`]); 0 without one.
    pub balance_weight: f64,
}

impl Remedy {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::BiasBump, Self::Reinit, Self::RaiseBalance];

    /// As recipes spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::BiasBump => "bias_bump",
            Self::Reinit => "reinit",
            Self::RaiseBalance => "raise_balance",
        }
    }
}

impl Remedies {
    /// Reads the names of a recipe; `balanced` tells whether it has a balance loss to raise. `field` is the path of the
    /// list, for messages.
    pub fn new(field: &str, names: &[String], balanced: bool) -> Result<Self> {
        let mut enabled = Vec::new();
        for name in names {
            let Some(remedy) = Remedy::ALL.into_iter().find(|remedy| remedy.id() == name) else {
                let known = Remedy::ALL.map(Remedy::id).join(", ");
                return Err(Error::invalid(field, format!("'{name}' is unknown; remedies are {known}")));
            };
            if enabled.contains(&remedy) {
                return Err(Error::invalid(field, format!("'{name}' is there twice")));
            }
            if remedy == Remedy::RaiseBalance && !balanced {
                return Err(Error::invalid(field, "'raise_balance' needs a balance loss with a weight above 0, such as switch"));
            }
            enabled.push(remedy);
        }
        Ok(Self { enabled })
    }

    /// Whether `remedy` may act.
    pub fn has(&self, remedy: Remedy) -> bool {
        self.enabled.contains(&remedy)
    }

    /// The others.
    pub fn without(&self, remedy: Remedy) -> Self {
        Self { enabled: self.enabled.iter().copied().filter(|enabled| *enabled != remedy).collect() }
    }

    /// Whether none may act.
    pub fn is_empty(&self) -> bool {
        self.enabled.is_empty()
    }

    /// What to do after `step`, remembered in `treatment`. `monitor`, of the layer, starts anew where experts are made
    /// anew: what they had before says nothing, and would have them made anew again. Nothing while the layer is healthy
    /// or not yet judged, and no kind of remedy within [`COOLDOWN`] steps of its last act.
    ///
    /// Dead experts get a bias or are made anew, whichever acted longer ago, the bias first. The balance weight rises with
    /// any uneven load until it has reached [`CAP`].
    pub fn decide(&self, monitor: &mut Monitor, evidence: &Evidence<'_>, treatment: &mut Treatment, step: usize) -> Vec<Action> {
        let mut actions = Vec::new();
        if monitor.health().is_none_or(|health| health == Health::Healthy) {
            return actions;
        }
        let dead = monitor.dead();
        let reviving = [Remedy::BiasBump, Remedy::Reinit];
        if !dead.is_empty() && treatment.rested(&reviving, step) {
            let turn = reviving.into_iter().filter(|remedy| self.has(*remedy)).min_by_key(|remedy| treatment.last.get(remedy).copied());
            let donor = monitor.busiest();
            let act = |expert| match turn? {
                Remedy::BiasBump => Some(Action::BumpBias { expert, to: evidence.fair_bias(monitor, expert)? }),
                _ => Some(Action::Reinit { expert, donor, noise: REINIT_NOISE }),
            };
            actions.extend(dead.into_iter().filter_map(act));
            treatment.last.extend(turn.filter(|_| !actions.is_empty()).map(|remedy| (remedy, step)));
        }
        let room = evidence.balance_weight > 0.0 && evidence.balance_weight < CAP;
        if self.has(Remedy::RaiseBalance) && room && treatment.rested(&[Remedy::RaiseBalance], step) {
            treatment.factor *= 2.0;
            treatment.last.insert(Remedy::RaiseBalance, step);
            actions.push(Action::RaiseBalance { factor: treatment.factor });
        }
        if actions.iter().any(|action| matches!(action, Action::Reinit { .. })) {
            monitor.reset();
        }
        actions
    }
}

impl Action {
    /// What it does to the selection bias of the layer, `bias [E]`, where there is one.
    ///
    /// An expert made anew has the bias of its donor. With that of the dead one it would not share the donor's tokens
    /// but win or lose them all.
    pub fn apply_to(&self, bias: &mut [f64]) {
        let (expert, value) = match *self {
            Self::BumpBias { expert, to } => (expert, Some(to)),
            Self::Reinit { expert, donor, .. } => (expert, bias.get(donor).copied()),
            Self::RaiseBalance { .. } => return,
        };
        if let (Some(bias), Some(value)) = (bias.get_mut(expert), value) {
            *bias = value;
        }
    }
}

/// Weights of an expert that is made anew: those of its `donor`, and normal noise of `noise` times their standard
/// deviation. `row` tells the noise of one expert and part of it from that of another.
pub fn renewed(donor: &[f64], noise: f64, draw: &Draw, row: usize) -> Vec<f64> {
    let n = donor.len().max(1) as f64;
    let mean = donor.iter().sum::<f64>() / n;
    let std = (donor.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt();
    let noisy = |(i, value): (usize, &f64)| value + noise * std * draw.normal(Stream::Reinit, row as u64, i as u64);
    donor.iter().enumerate().map(noisy).collect()
}

impl Treatment {
    /// Factor on the weights of the balance losses of this layer.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// A recipe's balance weight as it is in force in this layer: raised, up to [`CAP`].
    pub fn balance_weight(&self, weight: f64) -> f64 {
        (weight * self.factor).min(CAP).max(weight)
    }

    fn rested(&self, remedies: &[Remedy], step: usize) -> bool {
        remedies.iter().filter_map(|remedy| self.last.get(remedy)).all(|last| step >= last + COOLDOWN)
    }
}

impl Default for Treatment {
    fn default() -> Self {
        Self { last: BTreeMap::new(), factor: 1.0 }
    }
}

impl Evidence<'_> {
    /// The bias with which `expert` would have had a fair share, k/E, of the batch's tokens, the other biases as they
    /// are; at least its present one. `None` where no token says anything.
    fn fair_bias(&self, monitor: &Monitor, expert: usize) -> Option<f64> {
        let (experts, k) = (monitor.load().len(), monitor.k());
        let bias = |e: usize| self.bias.get(e).copied().unwrap_or(0.0);
        let mut missing: Vec<f64> = self
            .scores
            .chunks_exact(experts)
            .filter(|row| row.iter().all(|score| score.is_finite()))
            .map(|row| {
                let mut others: Vec<f64> = (0..experts).filter(|&e| e != expert).map(|e| row[e] + bias(e)).collect();
                others.sort_by(|a, b| b.total_cmp(a));
                others.get(k - 1).copied().unwrap_or(row[expert]) - row[expert]
            })
            .collect();
        missing.sort_by(f64::total_cmp);
        let fair = (missing.len() * k).div_ceil(experts).min(missing.len());
        // A hair above: a tie goes to the lower index, which need not be this expert.
        let needed = *missing.get(fair.checked_sub(1)?)?;
        Some((needed + 1e-9 * (1.0 + needed.abs())).max(bias(expert)))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BumpBias { expert, to } => write!(f, "selection bias of dead expert {expert} raised to {to:.3}"),
            Self::Reinit { expert, donor, noise } => {
                write!(f, "dead expert {expert} made anew from expert {donor} with noise of {:.0} %", noise * 100.0)
            }
            Self::RaiseBalance { factor } => write!(f, "weights of balance losses now {factor} times those of the recipe"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::choices::Choices;

    /// That so many tokens prefer each expert.
    fn observe(monitor: &mut Monitor, counts: &[usize]) {
        let tokens = Choices::from_rows(counts.iter().enumerate().flat_map(|(e, &n)| std::iter::repeat_n([e as u32], n)));
        monitor.observe(tokens.rows());
    }

    fn monitor(counts: &[usize]) -> Monitor {
        let mut monitor = Monitor::new(counts.len(), 1, 1000);
        observe(&mut monitor, counts);
        monitor
    }

    fn remedies(names: &[&str]) -> Remedies {
        Remedies::new("remedies", &names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>(), true).unwrap()
    }

    /// Four tokens that all prefer expert 0; expert 3 is 1, 2, 3 and 4 behind.
    const SCORES: [f64; 16] = [8.0, 1.0, 2.0, 7.0, 8.0, 1.0, 2.0, 6.0, 8.0, 1.0, 2.0, 5.0, 8.0, 1.0, 2.0, 4.0];

    const EVIDENCE: Evidence<'_> = Evidence { scores: &SCORES, bias: &[], balance_weight: 0.02 };

    #[test]
    fn a_healthy_layer_and_an_unjudged_one_are_left_alone() {
        let all = remedies(&["bias_bump", "reinit", "raise_balance"]);
        for mut monitor in [monitor(&[100, 101, 99, 100]), monitor(&[199, 0, 0, 0])] {
            assert_eq!(all.decide(&mut monitor, &EVIDENCE, &mut Treatment::default(), 0), []);
        }
        assert_eq!(Remedies::default().decide(&mut monitor(&[900, 0, 0, 0]), &EVIDENCE, &mut Treatment::default(), 0), []);
    }

    #[test]
    fn a_bump_gives_the_fair_share() {
        let mut monitor = monitor(&[300, 300, 300, 0]);
        let mut bump = |evidence: &Evidence<'_>| remedies(&["bias_bump"]).decide(&mut monitor, evidence, &mut Treatment::default(), 7);
        let actions = bump(&EVIDENCE);
        let [Action::BumpBias { expert: 3, to }] = actions[..] else { panic!("{actions:?}") };
        let won = SCORES.chunks_exact(4).filter(|row| row[3] + to > row[0]).count();
        assert_eq!(won, 1, "a quarter of four tokens, with a bias of {to}");
        let biased = Evidence { bias: &[0.0, 0.0, 0.0, 5.0], ..EVIDENCE };
        assert_eq!(bump(&biased), [Action::BumpBias { expert: 3, to: 5.0 }], "never lowered");
        assert_eq!(bump(&Evidence { scores: &[f64::NAN; 4], ..EVIDENCE }), []);
    }

    #[test]
    fn remedies_for_the_dead_take_turns_and_rest() {
        let both = remedies(&["reinit", "bias_bump"]);
        let mut treatment = Treatment::default();
        let mut kinds = Vec::new();
        for step in 0..200 {
            for action in both.decide(&mut monitor(&[450, 450, 0, 0]), &EVIDENCE, &mut treatment, step) {
                kinds.push((step, matches!(action, Action::Reinit { donor: 0, .. })));
            }
        }
        assert_eq!(kinds, [(0, false), (0, false), (50, true), (50, true), (100, false), (100, false), (150, true), (150, true)]);
    }

    /// The window is far longer than the cooldown: what was seen before must not count.
    #[test]
    fn an_expert_made_anew_gets_the_time_to_live() {
        let mut monitor = Monitor::new(4, 1, 1_000_000);
        observe(&mut monitor, &[18_000, 18_000, 18_000, 0]);
        let (reinit, mut treatment) = (remedies(&["reinit"]), Treatment::default());
        let donor = Action::Reinit { expert: 3, donor: 0, noise: REINIT_NOISE };
        assert_eq!(reinit.decide(&mut monitor, &EVIDENCE, &mut treatment, 0), [donor]);
        assert_eq!((monitor.health(), monitor.dead()), (None, vec![]));
        for step in 1..3 * COOLDOWN {
            observe(&mut monitor, &[3, 3, 3, 2]);
            assert_eq!(reinit.decide(&mut monitor, &EVIDENCE, &mut treatment, step), [], "step {step}");
        }
    }

    #[test]
    fn the_balance_weight_doubles_up_to_its_cap() {
        let mut monitor = monitor(&[600, 100, 100, 100]);
        let raise = remedies(&["raise_balance"]);
        let mut treatment = Treatment::default();
        let mut weights = Vec::new();
        for step in 0..400 {
            let evidence = Evidence { balance_weight: treatment.balance_weight(0.02), ..EVIDENCE };
            if let [action] = raise.decide(&mut monitor, &evidence, &mut treatment, step)[..] {
                assert_eq!(action, Action::RaiseBalance { factor: treatment.factor() });
                weights.push((step, treatment.balance_weight(0.02)));
            }
        }
        assert_eq!(weights, [(0, 0.04), (50, 0.08), (100, 0.1)]);
        assert_eq!(treatment.balance_weight(0.5), 0.5, "what a recipe has above the cap stays");
    }

    #[test]
    fn a_bias_goes_with_what_is_made_anew() {
        let mut bias = [-1.0, 0.0, 1.0, 0.5];
        Action::Reinit { expert: 2, donor: 0, noise: 0.02 }.apply_to(&mut bias);
        Action::BumpBias { expert: 3, to: 4.0 }.apply_to(&mut bias);
        Action::RaiseBalance { factor: 2.0 }.apply_to(&mut bias);
        assert_eq!(bias, [-1.0, 0.0, -1.0, 4.0]);
        Action::Reinit { expert: 2, donor: 0, noise: 0.02 }.apply_to(&mut []);
    }

    #[test]
    fn what_is_made_anew_differs_from_its_donor_and_from_others() {
        let draw = Draw::new(1, 2, 3);
        // Far from 0: the noise is relative to how far values are apart.
        let donor: Vec<f64> = (0..10_000).map(|i| 100.0 + f64::from(i % 2)).collect();
        let [a, b] = [0, 1].map(|row| renewed(&donor, 0.02, &draw, row));
        let apart = |a: &[f64], b: &[f64]| (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 1e4).sqrt();
        assert!((apart(&a, &donor) / 0.01 - 1.0).abs() < 0.03, "2 % of ½");
        assert!((apart(&a, &b) / 0.01 - 2f64.sqrt()).abs() < 0.03, "independent");
    }

    #[test]
    fn names_are_checked() {
        let read = |names: &[&str], balanced| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            Remedies::new("routing.remedies", &names, balanced).map_err(|error| error.to_string())
        };
        assert!(read(&["bias_bump", "reinit", "raise_balance"], true).is_ok() && read(&[], false).unwrap().is_empty());
        for (names, balanced, message) in [
            (&["reset"][..], true, "routing.remedies: 'reset' is unknown; remedies are bias_bump, reinit, raise_balance"),
            (&["reinit", "reinit"], true, "routing.remedies: 'reinit' is there twice"),
            (&["raise_balance"], false, "routing.remedies: 'raise_balance' needs a balance loss"),
        ] {
            assert!(read(names, balanced).unwrap_err().starts_with(message), "{names:?}");
        }
    }

    #[test]
    fn a_treatment_survives_a_save() {
        let mut treatment = Treatment::default();
        remedies(&["reinit", "raise_balance"]).decide(&mut monitor(&[900, 0, 0, 0]), &EVIDENCE, &mut treatment, 3);
        let text = serde_json::to_string(&treatment).unwrap();
        assert_eq!(serde_json::from_str::<Treatment>(&text).unwrap(), treatment);
        assert_ne!(treatment, Treatment::default());
    }
}
