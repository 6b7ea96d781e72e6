//! From messages back to what they say, for clients that show it as a run of their own.

use crate::{
    service::{convert::routing_rule, proto},
    tune::{
        evaluate::{Figures, RoutingFigures},
        gates::Verdict,
        tuner::{Event, Phase, Step},
    },
};

/// What a job did; `None` of what is about the job as a whole.
pub fn read_event(event: &proto::watch_tuning_response::Event) -> Option<Event> {
    use proto::watch_tuning_response::Event as Told;
    match event {
        Told::Step(told) => Some(Event::Step(step(told))),
        Told::Evaluation(told) => {
            let figures = told.figures.as_ref().map(read_figures)?;
            Some(Event::Evaluation { step: told.step as usize, figures })
        }
        Told::Job(_) => None,
    }
}

/// What a run is at, where that is something that a run of its own is at.
pub fn read_phase(phase: proto::TuningPhase) -> Option<Phase> {
    match phase {
        proto::TuningPhase::Unspecified | proto::TuningPhase::Draining => None,
        proto::TuningPhase::Baseline => Some(Phase::Baseline),
        proto::TuningPhase::Training => Some(Phase::Training),
        proto::TuningPhase::Evaluating => Some(Phase::Evaluating),
        proto::TuningPhase::Saving => Some(Phase::Saving),
    }
}

/// Figures, with layers in the order of the message.
pub fn read_figures(figures: &proto::TuningFigures) -> Figures {
    Figures {
        tokens: figures.tokens,
        reference_perplexity: figures.reference_perplexity,
        routings: figures.routings.iter().map(routed).collect(),
    }
}

/// How a candidate stands.
pub fn read_verdicts(verdicts: &[proto::TuningVerdict]) -> Vec<Verdict> {
    let read = |verdict: &proto::TuningVerdict| {
        let proto::TuningVerdict { gate, passed, current, candidate, limit } = verdict;
        Verdict { gate: gate.clone(), passed: *passed, current: *current, candidate: *candidate, limit: *limit }
    };
    verdicts.iter().map(read).collect()
}

fn routed(figures: &proto::tuning_figures::Routed) -> RoutingFigures {
    let rule = figures.routing.clone().and_then(|policy| routing_rule(policy, "routing").ok());
    RoutingFigures {
        routing: rule.map(|rule| rule.to_string()).unwrap_or_default(),
        k: figures.top_k.map(|k| k as usize),
        perplexity: figures.perplexity,
        kl: figures.kl,
        teacher_kl: figures.teacher_kl,
        top1_agree: figures.top1_agree,
        utilization: figures.layers.iter().map(|layer| layer.utilization.clone()).collect(),
        dead: figures.layers.iter().map(|layer| layer.dead_experts as usize).collect(),
    }
}

fn step(told: &proto::watch_tuning_response::Step) -> Step {
    let mut losses: std::collections::BTreeMap<String, f64> = told.losses.clone().into_iter().collect();
    Step {
        step: told.step as usize,
        loss: losses.remove("total").unwrap_or(f64::NAN),
        lm_loss: losses.remove("lm").unwrap_or(f64::NAN),
        distill_loss: losses.remove("distill"),
        losses,
        grad_norm: told.grad_norm,
        router_grad_norm: told.router_grad_norm,
        skipped: told.skipped_steps as usize,
        learning_rate: told.learning_rate,
        sharpness: told.temperature,
        loads: told.loads.clone(),
        tokens_per_second: told.tokens_per_second,
        eta_seconds: told.eta_seconds,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        jobs::{Entry, What},
        service::tuning::convert::Scribe,
    };

    fn told(event: Event) -> Option<Event> {
        let entry = Entry { sequence: 3, history: true, what: What::Event(event) };
        let message = Scribe::of(vec![1, 3]).entry(&entry, 0.25)?;
        assert_eq!((message.sequence, message.history), (3, true));
        read_event(&message.event?)
    }

    #[test]
    fn events_survive_the_wire() {
        let step = Event::Step(Step {
            step: 7,
            loss: 3.5,
            lm_loss: 3.0,
            distill_loss: Some(0.5),
            losses: BTreeMap::from([("z".into(), 0.1)]),
            grad_norm: None,
            router_grad_norm: Some(0.2),
            skipped: 2,
            learning_rate: 1e-3,
            sharpness: 0.7,
            loads: vec![1.5, 2.0],
            tokens_per_second: 900.0,
            eta_seconds: 12.0,
        });
        let routing = |name: &str, k| RoutingFigures {
            routing: name.into(),
            k,
            perplexity: 9.5,
            kl: 0.1,
            teacher_kl: f64::INFINITY,
            top1_agree: 0.9,
            utilization: vec![vec![1.0, 0.0], vec![0.5, 1.5]],
            dead: vec![1, 0],
        };
        let routings = vec![routing("native", Some(1)), routing("top-2", Some(2)), routing("mass-0.9", None)];
        let figures = Figures { tokens: 100, reference_perplexity: 9.0, routings };
        for event in [step, Event::Evaluation { step: 50, figures }] {
            assert_eq!(told(event.clone()), Some(event));
        }
        assert_eq!(told(Event::Evaluated(5)), None);
    }
}
