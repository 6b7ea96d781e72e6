//! What a candidate must be to take the place of what is served.

use serde::{Deserialize, Serialize};

use super::evaluate::{Figures, RoutingFigures, number};

/// Limits, on held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gates {
    /// Perplexity under the serving routing, over that of what is served now.
    pub max_perplexity_ratio: f64,
    /// Own gap under the serving routing, over that of what is served now.
    pub max_gap_ratio: f64,
    /// Experts that no token goes to and that are not dead now, all layers together; under every routing that was measured.
    pub max_new_dead: usize,
}

/// How a candidate stands at one gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// `perplexity`, `gap`, or `newly dead experts (ROUTING)`.
    pub gate: String,
    /// It may pass.
    pub passed: bool,
    /// Of what is served now.
    #[serde(deserialize_with = "number")]
    pub current: f64,
    /// Of the candidate.
    #[serde(deserialize_with = "number")]
    pub candidate: f64,
    /// The most that passes.
    #[serde(deserialize_with = "number")]
    pub limit: f64,
}

impl Default for Gates {
    fn default() -> Self {
        Self { max_perplexity_ratio: 1.0, max_gap_ratio: 1.0, max_new_dead: 0 }
    }
}

impl Verdict {
    fn new(gate: impl Into<String>, [current, candidate]: [f64; 2], limit: f64) -> Self {
        // A figure that is no number passes nothing, and is no limit.
        let passed = candidate.is_finite() && limit.is_finite() && candidate <= limit;
        Self { gate: gate.into(), passed, current, candidate, limit }
    }
}

/// How a candidate stands. The first routing of the figures is the serving one.
pub fn judge(gates: &Gates, current: &Figures, candidate: &Figures) -> Vec<Verdict> {
    let pairs = || current.routings.iter().zip(&candidate.routings);
    let of_serving = |gate: &str, figure: fn(&RoutingFigures) -> f64, ratio: f64| {
        let (current, candidate) = pairs().next()?;
        Some(Verdict::new(gate, [figure(current), figure(candidate)], figure(current) * ratio))
    };
    let perplexity = of_serving("perplexity", |routing| routing.perplexity, gates.max_perplexity_ratio);
    let gap = of_serving("gap", |routing| routing.kl, gates.max_gap_ratio);
    let dead = |(current, candidate): (&RoutingFigures, &RoutingFigures)| {
        let new = newly_dead(current, candidate) as f64;
        Verdict::new(format!("newly dead experts ({})", current.routing), [0.0, new], gates.max_new_dead as f64)
    };
    perplexity.into_iter().chain(gap).chain(pairs().map(dead)).collect()
}

/// Experts that no token goes to, of those that some went to before.
fn newly_dead(current: &RoutingFigures, candidate: &RoutingFigures) -> usize {
    let experts = |figures: &RoutingFigures| figures.utilization.concat();
    experts(current).into_iter().zip(experts(candidate)).filter(|&(now, then)| now > 0.0 && then == 0.0).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(routings: &[(f64, f64, usize)]) -> Figures {
        let routing = |&(perplexity, kl, dead): &(f64, f64, usize)| RoutingFigures {
            routing: "top-1".into(),
            k: Some(1),
            perplexity,
            kl,
            teacher_kl: kl,
            top1_agree: 1.0,
            utilization: vec![(0..4).map(|expert| if expert < dead { 0.0 } else { 1.0 }).collect(), vec![1.0; 4]],
            dead: vec![dead, 0],
        };
        Figures { tokens: 100, reference_perplexity: 9.0, routings: routings.iter().map(routing).collect() }
    }

    fn passed(gates: Gates, candidate: &[(f64, f64, usize)]) -> Vec<bool> {
        let current = figures(&[(10.0, 0.2, 0), (9.5, 0.1, 1)]);
        judge(&gates, &current, &figures(candidate)).into_iter().map(|verdict| verdict.passed).collect()
    }

    #[test]
    fn every_gate_can_refuse_alone() {
        let gates = Gates::default();
        assert_eq!(passed(gates, &[(10.0, 0.2, 0), (99.0, 9.0, 1)]), [true; 4], "as good as before; other routings may lose");
        assert_eq!(passed(gates, &[(10.1, 0.1, 0), (9.0, 0.1, 1)]), [false, true, true, true]);
        assert_eq!(passed(gates, &[(9.0, 0.21, 0), (9.0, 0.1, 1)]), [true, false, true, true]);
        assert_eq!(
            passed(gates, &[(9.0, 0.1, 0), (9.0, 0.1, 2)]),
            [true, true, true, false],
            "dead under a routing that is not the serving one"
        );
        assert_eq!(passed(gates, &[(f64::NAN, f64::INFINITY, 0), (9.0, 0.1, 0)]), [false, false, true, true]);
    }

    #[test]
    fn another_dead_expert_is_a_new_one() {
        let (current, mut candidate) = (figures(&[(9.0, 0.1, 1)]), figures(&[(9.0, 0.1, 0)]));
        let passes = |candidate: &Figures| judge(&Gates::default(), &current, candidate).iter().all(|verdict| verdict.passed);
        assert!(passes(&candidate));
        candidate.routings[0].utilization[1][2] = 0.0;
        assert!(!passes(&candidate), "as many as before, and not the same");
    }

    #[test]
    fn no_number_is_no_limit() {
        for (perplexity, kl) in [(f64::INFINITY, 0.1), (9.0, f64::INFINITY), (f64::NAN, f64::NAN)] {
            let broken = figures(&[(perplexity, kl, 0)]);
            for candidate in [&broken, &figures(&[(1e9, 1e9, 0)])] {
                assert!(judge(&Gates::default(), &broken, candidate).iter().any(|verdict| !verdict.passed), "{perplexity} {kl}");
            }
        }
    }

    #[test]
    fn gates_can_be_wider() {
        let gates = Gates { max_perplexity_ratio: 1.02, max_gap_ratio: 2.0, max_new_dead: 1 };
        assert_eq!(passed(gates, &[(10.1, 0.39, 1), (9.0, 0.1, 2)]), [true; 4]);
        assert_eq!(passed(gates, &[(10.3, 0.41, 2), (9.0, 0.1, 3)]), [false; 4]);
    }
}
