//! Between [`proto::TuningConfig`] and [`TuneConfig`]. Ranges are checked by the plan; here is only what its types cannot hold.

use std::collections::{BTreeMap, HashMap};

use crate::{
    engine::Share,
    error::{Error, Result},
    moe::{estimator::Param, policy::RoutingRule},
    schedule::{Schedule, Shape},
    service::{
        convert::{routing_message, routing_rule, saturate},
        proto,
    },
    tune::{
        config::{Distill, EarlyStop, Recompute, TuneConfig, TuneOptimizer, TuneRouting, TuneRun},
        gates::Gates,
        select::Target,
    },
};

/// Where the fields of a [`TuneConfig`] are in a message; the first that fits counts.
const PLACES: &[(&str, &str)] = &[
    ("routing.estimator", "config.routing.estimator"),
    ("routing.k", "config.routing.k"),
    ("routing.losses", "config.routing.losses"),
    ("routing", "config.routing.parameters"),
    ("optimizer", "config.optimizer"),
    ("run.serving", "config.routing.serving"),
    ("run.reference", "config.routing.reference"),
    ("run.heldout_share", "config.data.heldout_share"),
    ("run.recompute", "config.run.recompute_layers"),
    ("run", "config.run"),
    ("distill", "config.distillation"),
    ("stop", "config.early_stop"),
    ("gates.max_new_dead", "config.gates.max_new_dead_experts"),
    ("gates", "config.gates"),
    ("share", "config.share"),
    ("heldout", "config.data.heldout_paths"),
];

/// What a message asks for. `serving` is the routing in force, which is tuned for where the message names none.
///
/// # Errors
/// `InvalidArgument` on a field of the message: an enum value that there is none of, a oneof without a choice, a number that is none.
pub(super) fn config(message: &proto::TuningConfig, serving: &RoutingRule) -> Result<TuneConfig> {
    let mut config = TuneConfig { target: target(message.target, &message.tensors)?, ..TuneConfig::default() };
    routing(message.routing.clone().unwrap_or_default(), &mut config.routing, &mut config.run, serving)?;
    optimizer(message.optimizer.unwrap_or_default(), &mut config.optimizer);
    run(message.run.unwrap_or_default(), &mut config.run);
    if let Some(share) = message.data.as_ref().and_then(|data| data.heldout_share) {
        config.run.heldout_share = share;
    }
    config.distill = message.distillation.map(distillation);
    config.stop = message.early_stop.map(early_stop);
    gates(message.gates.unwrap_or_default(), &mut config.gates)?;
    Ok(config)
}

/// An error about `config` as one about the message that it came in.
pub(super) fn in_message(error: Error, config: &TuneConfig) -> Error {
    let target = if matches!(config.target, Target::Named(_)) { "config.tensors" } else { "config.target" };
    let error = error.rooted("target", target);
    PLACES.iter().fold(error, |error, (from, to)| error.rooted(from, to))
}

/// How much of the machine `message`, which came in `field`, asks for.
pub(super) fn share(message: proto::TuningShare, field: &str) -> Result<Share> {
    use proto::tuning_share::Share as Asked;
    let share = match message.share {
        None => return Err(Error::invalid(field, "neither exclusive nor duty_cycle is set")),
        Some(Asked::Exclusive(_)) => Share::Exclusive,
        Some(Asked::DutyCycle(duty)) => Share::Background { duty },
    };
    share.check().map_err(|error| error.rooted("share", field))?;
    Ok(share)
}

pub(super) fn share_message(share: Share) -> proto::TuningShare {
    use proto::tuning_share::{Exclusive, Share as Asked};
    proto::TuningShare {
        share: Some(match share {
            Share::Exclusive => Asked::Exclusive(Exclusive {}),
            Share::Background { duty } => Asked::DutyCycle(duty),
        }),
    }
}

/// A run as the message that asks for it; who asked, for how much of the machine and on which text is not in it.
pub fn tuning_message(config: &TuneConfig) -> proto::TuningConfig {
    let TuneConfig { target, routing, optimizer, run, distill, stop, gates } = config;
    let (target, tensors) = match target {
        Target::Router => (proto::TuningTarget::Router, Vec::new()),
        Target::RouterAndExperts => (proto::TuningTarget::RouterAndExperts, Vec::new()),
        Target::All => (proto::TuningTarget::All, Vec::new()),
        Target::Named(names) => (proto::TuningTarget::Named, names.clone()),
    };
    proto::TuningConfig {
        target: target.into(),
        tensors,
        routing: Some(routing_part(routing, run)),
        optimizer: Some(optimizer_part(optimizer)),
        run: Some(run_part(run)),
        distillation: distill
            .map(|Distill { weight, lm_weight }| proto::TuningDistillation { weight: Some(weight), lm_weight: Some(lm_weight) }),
        early_stop: stop.map(|EarlyStop { patience, min_change }| proto::TuningEarlyStop {
            patience: Some(saturate(patience)),
            min_change: Some(min_change),
        }),
        gates: Some(proto::TuningGates {
            max_perplexity_ratio: Some(gates.max_perplexity_ratio),
            max_gap_ratio: Some(gates.max_gap_ratio),
            max_new_dead_experts: Some(saturate(gates.max_new_dead)),
        }),
        data: Some(proto::TuningData { heldout_share: Some(run.heldout_share), ..proto::TuningData::default() }),
        ..proto::TuningConfig::default()
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn count(field: &mut usize, value: Option<u32>) {
    set(field, value.map(|value| value as usize));
}

fn target(target: i32, tensors: &[String]) -> Result<Target> {
    use proto::TuningTarget as Asked;
    let whole = match Asked::try_from(target) {
        Ok(Asked::Unspecified | Asked::Router) => Target::Router,
        Ok(Asked::RouterAndExperts) => Target::RouterAndExperts,
        Ok(Asked::All) => Target::All,
        Ok(Asked::Named) if tensors.is_empty() => return Err(Error::invalid("config.tensors", "name the tensors that are to learn")),
        Ok(Asked::Named) => return Ok(Target::Named(tensors.to_vec())),
        Err(_) => return Err(Error::invalid("config.target", format!("{target} is not a value of hardmax.v1.TuningTarget"))),
    };
    if tensors.is_empty() { Ok(whole) } else { Err(Error::invalid("config.tensors", "has no effect without TUNING_TARGET_NAMED")) }
}

fn routing(message: proto::TuningRouting, routing: &mut TuneRouting, run: &mut TuneRun, serving: &RoutingRule) -> Result<()> {
    let proto::TuningRouting { estimator, k, parameters, losses, serving: asked, reference } = message;
    if !estimator.is_empty() && estimator != routing.estimator {
        // Those of another one have no meaning for it.
        routing.params.clear();
        routing.estimator = estimator;
    }
    routing.k = k.map(|k| k as usize);
    for (name, parameter) in sorted(parameters) {
        let value = param(parameter, &format!("config.routing.parameters.{name}"))?;
        routing.params.insert(name, value);
    }
    for (name, loss) in sorted(losses) {
        let weight = schedule(loss, &format!("config.routing.losses.{name}"))?;
        routing.losses.insert(name, weight);
    }
    run.serving = match asked {
        Some(policy) => Some(one_for_all(&routing_rule(policy, "config.routing.serving")?, "config.routing.serving")?),
        None if *serving == RoutingRule::default() => None,
        None => Some(one_for_all(serving, "config.routing.serving")?),
    };
    let reference = reference.map(|policy| one_for_all(&routing_rule(policy, "config.routing.reference")?, "config.routing.reference"));
    run.reference = reference.transpose()?;
    Ok(())
}

/// A routing as the run spells it.
fn one_for_all(rule: &RoutingRule, field: &str) -> Result<String> {
    match rule {
        RoutingRule::Same(choice) => Ok(choice.to_string()),
        RoutingRule::LayerTopK { .. } => {
            Err(Error::invalid(field, format!("{rule} is another one in each layer: name one routing for all, as top-1")))
        }
    }
}

/// In an order of its own: which of two mistakes is told must not change from call to call.
fn sorted<T>(map: HashMap<String, T>) -> BTreeMap<String, T> {
    map.into_iter().collect()
}

fn param(message: proto::TuningParameter, field: &str) -> Result<Param> {
    use proto::tuning_parameter::Value;
    Ok(match message.value {
        None => return Err(Error::invalid(field, "none of number, flag, word, schedule is set")),
        Some(Value::Number(number)) => Param::Number(number),
        Some(Value::Flag(flag)) => Param::Flag(flag),
        Some(Value::Word(word)) => Param::Word(word),
        Some(Value::Schedule(written)) => Param::Schedule(schedule(written, field)?),
    })
}

fn schedule(message: proto::TuningSchedule, field: &str) -> Result<Schedule> {
    let proto::TuningSchedule { shape, init, r#final, hold_start, hold_end, begin, until } = message;
    let shapes = [Shape::Constant, Shape::Linear, Shape::Exp, Shape::Cosine];
    let shape = match (shape.as_str(), r#final) {
        ("", None) => Shape::Constant,
        ("", Some(_)) => Shape::default(),
        (id, _) => shapes.into_iter().find(|shape| shape.id() == id).ok_or_else(|| {
            let known = shapes.map(Shape::id).join(", ");
            Error::invalid(format!("{field}.shape"), format!("'{id}' is unknown; one of {known}"))
        })?,
    };
    if (hold_start.or(hold_end).is_some()) && (begin.or(until).is_some()) {
        return Err(Error::invalid(field, "begin and until take the place of hold_start and hold_end: give one pair"));
    }
    let mut schedule = Schedule::new(shape, init, r#final.unwrap_or(init));
    set(&mut schedule.hold_start, hold_start);
    set(&mut schedule.hold_end, hold_end);
    (schedule.begin, schedule.until) = (begin.map(|step| step as usize), until.map(|step| step as usize));
    Ok(schedule)
}

fn optimizer(message: proto::TuningOptimizer, optimizer: &mut TuneOptimizer) {
    set(&mut optimizer.learning_rate, message.learning_rate);
    set(&mut optimizer.router_rate, message.router_rate);
    set(&mut optimizer.expert_rate, message.expert_rate);
    set(&mut optimizer.final_ratio, message.final_ratio);
    optimizer.warmup_steps = message.warmup_steps.map(|steps| steps as usize).or(optimizer.warmup_steps);
    set(&mut optimizer.weight_decay, message.weight_decay);
    set(&mut optimizer.beta1, message.beta1);
    set(&mut optimizer.beta2, message.beta2);
    set(&mut optimizer.clip_norm, message.clip_norm);
}

fn run(message: proto::TuningRun, run: &mut TuneRun) {
    count(&mut run.steps, message.steps);
    count(&mut run.windows, message.windows);
    count(&mut run.micro_windows, message.micro_windows);
    run.window_tokens = message.window_tokens.map(|tokens| tokens as usize).or(run.window_tokens);
    set(&mut run.seed, message.seed);
    count(&mut run.eval_every, message.eval_every);
    count(&mut run.eval_tokens, message.eval_tokens);
    count(&mut run.save_every, message.save_every);
    if message.recompute_layers {
        run.recompute = Recompute::Layer;
    }
    run.max_seconds = message.max_seconds.or(run.max_seconds);
    run.max_memory_bytes = message.max_memory_bytes.or(run.max_memory_bytes);
    count(&mut run.skip_limit, message.skip_limit);
}

fn distillation(message: proto::TuningDistillation) -> Distill {
    let mut distill = Distill::default();
    set(&mut distill.weight, message.weight);
    set(&mut distill.lm_weight, message.lm_weight);
    distill
}

fn early_stop(message: proto::TuningEarlyStop) -> EarlyStop {
    let mut stop = EarlyStop::default();
    count(&mut stop.patience, message.patience);
    set(&mut stop.min_change, message.min_change);
    stop
}

fn gates(message: proto::TuningGates, gates: &mut Gates) -> Result<()> {
    for (field, limit, asked) in [
        ("max_perplexity_ratio", &mut gates.max_perplexity_ratio, message.max_perplexity_ratio),
        ("max_gap_ratio", &mut gates.max_gap_ratio, message.max_gap_ratio),
    ] {
        if let Some(ratio) = asked.filter(|ratio| !(ratio.is_finite() && *ratio > 0.0)) {
            return Err(Error::invalid(format!("config.gates.{field}"), format!("{ratio} is not a finite number above 0")));
        }
        set(limit, asked);
    }
    count(&mut gates.max_new_dead, message.max_new_dead_experts);
    Ok(())
}

fn routing_part(routing: &TuneRouting, run: &TuneRun) -> proto::TuningRouting {
    let rule = |text: &Option<String>| text.as_ref().and_then(|text| text.parse().ok()).map(|rule| routing_message(&rule));
    proto::TuningRouting {
        estimator: routing.estimator.clone(),
        k: routing.k.map(saturate),
        parameters: routing.params.iter().map(|(name, param)| (name.clone(), param_message(param))).collect(),
        losses: routing.losses.iter().map(|(name, weight)| (name.clone(), schedule_message(weight))).collect(),
        serving: rule(&run.serving),
        reference: rule(&run.reference),
    }
}

fn param_message(param: &Param) -> proto::TuningParameter {
    use proto::tuning_parameter::Value;
    proto::TuningParameter {
        value: Some(match param {
            Param::Number(number) => Value::Number(*number),
            Param::Flag(flag) => Value::Flag(*flag),
            Param::Word(word) => Value::Word(word.clone()),
            Param::Schedule(schedule) => Value::Schedule(schedule_message(schedule)),
        }),
    }
}

fn schedule_message(schedule: &Schedule) -> proto::TuningSchedule {
    let Schedule { schedule: shape, init, end, hold_start, hold_end, begin, until } = *schedule;
    let shares = begin.or(until).is_none();
    proto::TuningSchedule {
        shape: shape.id().into(),
        init,
        r#final: Some(end),
        hold_start: shares.then_some(hold_start),
        hold_end: shares.then_some(hold_end),
        begin: begin.map(saturate),
        until: until.map(saturate),
    }
}

fn optimizer_part(optimizer: &TuneOptimizer) -> proto::TuningOptimizer {
    let TuneOptimizer { learning_rate, router_rate, expert_rate, final_ratio, warmup_steps, weight_decay, beta1, beta2, clip_norm } =
        *optimizer;
    proto::TuningOptimizer {
        learning_rate: Some(learning_rate),
        router_rate: Some(router_rate),
        expert_rate: Some(expert_rate),
        final_ratio: Some(final_ratio),
        warmup_steps: warmup_steps.map(saturate),
        weight_decay: Some(weight_decay),
        beta1: Some(beta1),
        beta2: Some(beta2),
        clip_norm: Some(clip_norm),
    }
}

fn run_part(run: &TuneRun) -> proto::TuningRun {
    proto::TuningRun {
        steps: Some(saturate(run.steps)),
        windows: Some(saturate(run.windows)),
        micro_windows: Some(saturate(run.micro_windows)),
        window_tokens: run.window_tokens.map(saturate),
        seed: Some(run.seed),
        eval_every: Some(saturate(run.eval_every)),
        eval_tokens: Some(saturate(run.eval_tokens)),
        save_every: Some(saturate(run.save_every)),
        recompute_layers: run.recompute == Recompute::Layer,
        max_seconds: run.max_seconds,
        max_memory_bytes: run.max_memory_bytes,
        skip_limit: Some(saturate(run.skip_limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::policy::RoutingChoice;

    fn native() -> RoutingRule {
        RoutingRule::default()
    }

    /// Every field is another one than by default.
    fn other() -> TuneConfig {
        let steps = Schedule { begin: Some(3), until: Some(9), ..Schedule::new(Shape::Linear, 2.0, 0.0) };
        TuneConfig {
            target: Target::Named(vec!["layers.1".into(), "head".into()]),
            routing: TuneRouting {
                estimator: "gumbel_soft".into(),
                k: Some(2),
                losses: BTreeMap::from([("switch".into(), Schedule::constant(0.01)), ("z".into(), steps)]),
                params: BTreeMap::from([
                    ("temperature".into(), Param::Schedule(Schedule { hold_end: 0.3, ..Schedule::new(Shape::Exp, 1.0, 0.2) })),
                    ("form".into(), Param::Word("steep".into())),
                    ("noisy".into(), Param::Flag(true)),
                    ("alpha".into(), Param::Number(1.5)),
                ]),
            },
            optimizer: TuneOptimizer {
                learning_rate: 0.1,
                router_rate: 0.2,
                expert_rate: 0.4,
                final_ratio: 0.5,
                warmup_steps: Some(0),
                weight_decay: 0.6,
                beta1: 0.7,
                beta2: 0.8,
                clip_norm: 0.9,
            },
            run: TuneRun {
                steps: 11,
                windows: 12,
                micro_windows: 3,
                window_tokens: Some(13),
                seed: u64::MAX,
                eval_every: 14,
                eval_tokens: 15,
                save_every: 16,
                heldout_share: 0.17,
                skip_limit: 18,
                recompute: Recompute::Layer,
                max_seconds: Some(19.5),
                max_memory_bytes: Some(20),
                serving: Some("top-2:raw".into()),
                reference: Some("soft:0.5".into()),
            },
            distill: Some(Distill { weight: 0.3, lm_weight: 0.0 }),
            stop: Some(EarlyStop { patience: 5, min_change: 0.01 }),
            gates: Gates { max_perplexity_ratio: 1.1, max_gap_ratio: 1.2, max_new_dead: 3 },
        }
    }

    #[test]
    fn every_setting_survives_the_wire() {
        for sent in [TuneConfig::default(), other()] {
            assert_eq!(config(&tuning_message(&sent), &native()).unwrap(), sent);
        }
        assert_eq!(config(&proto::TuningConfig::default(), &native()).unwrap(), TuneConfig::default(), "nothing said");
    }

    #[test]
    fn what_is_served_is_tuned_for() {
        let served = |rule: RoutingRule| config(&proto::TuningConfig::default(), &rule).map(|config| config.run.serving);
        assert_eq!(served(native()).unwrap(), None);
        assert_eq!(served(RoutingChoice::TopK { k: 2, weight_form: None }.into()).unwrap().as_deref(), Some("top-2"));
        let layers = RoutingRule::LayerTopK { k: vec![1, 2].into(), weight_form: None };
        assert!(served(layers).unwrap_err().to_string().starts_with("config.routing.serving: "));
    }

    #[test]
    fn a_schedule_may_be_a_number() {
        let read = |message: proto::TuningSchedule| schedule(message, "s");
        let at = |init, end: Option<f64>| proto::TuningSchedule { init, r#final: end, ..Default::default() };
        assert_eq!(read(at(0.5, None)).unwrap(), Schedule::constant(0.5));
        assert_eq!(read(at(0.5, Some(0.1))).unwrap(), Schedule::new(Shape::Exp, 0.5, 0.1));
    }

    #[test]
    fn what_no_type_can_hold_is_refused() {
        use proto::{TuningConfig, TuningGates, TuningParameter, TuningRouting, TuningSchedule, TuningTarget};
        let routing = |routing| TuningConfig { routing: Some(routing), ..Default::default() };
        let parameter =
            |value| TuningRouting { parameters: HashMap::from([("t".into(), TuningParameter { value })]), ..Default::default() };
        let loss = |loss| TuningRouting { losses: HashMap::from([("z".into(), loss)]), ..Default::default() };
        let gates = |gates| TuningConfig { gates: Some(gates), ..Default::default() };
        let empty = Some(proto::RoutingPolicy { policy: None });
        for (message, field) in [
            (TuningConfig { target: 99, ..Default::default() }, "config.target"),
            (TuningConfig { target: TuningTarget::Named.into(), ..Default::default() }, "config.tensors"),
            (TuningConfig { tensors: vec!["head".into()], ..Default::default() }, "config.tensors"),
            (routing(parameter(None)), "config.routing.parameters.t"),
            (routing(loss(TuningSchedule { shape: "round".into(), ..Default::default() })), "config.routing.losses.z.shape"),
            (routing(loss(TuningSchedule { hold_end: Some(0.1), until: Some(5), ..Default::default() })), "config.routing.losses.z"),
            (routing(TuningRouting { serving: empty.clone(), ..Default::default() }), "config.routing.serving.policy"),
            (routing(TuningRouting { reference: empty, ..Default::default() }), "config.routing.reference.policy"),
            (gates(TuningGates { max_gap_ratio: Some(f64::NAN), ..Default::default() }), "config.gates.max_gap_ratio"),
            (gates(TuningGates { max_perplexity_ratio: Some(-1.0), ..Default::default() }), "config.gates.max_perplexity_ratio"),
        ] {
            match config(&message, &native()) {
                Err(Error::InvalidArgument { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_share_is_all_or_a_part() {
        use proto::tuning_share::Share as Asked;
        let asked = |duty| share(proto::TuningShare { share: Some(Asked::DutyCycle(duty)) }, "config.share");
        assert_eq!(asked(0.25).unwrap(), Share::Background { duty: 0.25 });
        assert_eq!(share(share_message(Share::Exclusive), "config.share").unwrap(), Share::Exclusive);
        for bad in [0.0, 1.0, -1.0, f64::NAN] {
            assert!(asked(bad).unwrap_err().to_string().starts_with("config.share.duty_cycle: "), "{bad}");
        }
        assert!(share(proto::TuningShare { share: None }, "share").is_err());
    }

    #[test]
    fn errors_name_fields_of_the_message() {
        for (from, to) in [
            ("target", "config.target"),
            ("routing.estimator", "config.routing.estimator"),
            ("routing.losses.z", "config.routing.losses.z"),
            ("routing.temperature.init", "config.routing.parameters.temperature.init"),
            ("run.serving", "config.routing.serving"),
            ("run.steps", "config.run.steps"),
            ("distill.weight", "config.distillation.weight"),
            ("gates.max_new_dead", "config.gates.max_new_dead_experts"),
            ("data", "data"),
        ] {
            match in_message(Error::invalid(from, "x"), &TuneConfig::default()) {
                Error::InvalidArgument { field, .. } => assert_eq!(field, to),
                other => panic!("{other:?}"),
            }
        }
    }
}
