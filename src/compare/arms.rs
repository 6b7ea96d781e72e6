//! The built-in arms: which rows the tables have, by task and mode.

use std::collections::BTreeMap;

use super::{
    arm::{Arm, Route},
    spec::{Mode, TaskName},
};
use crate::{
    moe::{
        capacity::{Capacity, Order, Overflow},
        estimator::{
            EstimatorConfig, Param,
            catalog::{self, CATALOG, KRange, Kind, Way},
        },
        loss::AuxLoss,
    },
    schedule::{Schedule, Shape},
};

/// Share of the steps in which soft routing prepares the router of the control `experts_only`, from scratch.
const PREPARATION: f64 = 1.0 / 3.0;
/// Weight of the balance losses.
const BALANCE: f64 = 0.01;
/// Weight that keeps experts alive even where the start has collapsed.
const STRONG_BALANCE: f64 = 0.1;
/// Rate of loss-free balancing; larger than for language models, whose runs are longer.
const BIAS_RATE: f64 = 0.01;
/// Final temperatures of the steep softmax beside its default, 0.1.
const STEEP_ENDS: [f64; 3] = [0.3, 0.05, 0.02];
/// Start of annealed temperatures in tuning: the teacher's.
const TUNING_TEMPERATURE: f64 = 1.0;

/// Weight of staying near the teacher's router: a tenth of that of staying near its outputs, since a router that may not
/// move cannot become a hard one.
const ROUTER_KL: f64 = 0.1;

/// Estimators that have no place in a task, and why.
pub fn left_out(task: TaskName) -> &'static [(&'static str, &'static str)] {
    match task {
        TaskName::Gradient => &[("dselect_k", "its router has no output for each expert, so there is no gradient to compare with")],
        TaskName::Collapsed => &[(
            "dselect_k",
            "its router has no output for each expert, so expert 0 cannot be given a head start in logits as the others have it",
        )],
        _ => &[],
    }
}

/// The arms of a task in a mode, controls last.
pub fn arms(task: TaskName, mode: Mode) -> Vec<Arm> {
    let placed = CATALOG.iter().filter(|row| left_out(task).iter().all(|(name, _)| *name != row.name));
    let mut arms: Vec<Arm> = placed.map(|row| top_1(row.name)).collect();
    match (task, mode) {
        (TaskName::Rates, _) => {}
        (TaskName::Gradient, _) => arms.extend(gradient_variants()),
        (TaskName::Equal, Mode::Scratch) => {
            arms.extend(top_2(&CATALOG.iter().filter(|row| has_top_2(row.k)).map(|row| row.name).collect::<Vec<_>>()));
            arms.extend(variants());
        }
        (TaskName::Unequal | TaskName::Text, Mode::Scratch) => {
            arms.extend(top_2(&["renorm_topk", "ste"]));
            arms.extend(["onehot", "raw_topk", "ste"].map(|name| balanced(top_1(name))));
            arms.extend(["raw_topk", "ste"].map(|name| biased(top_1(name))));
        }
        (TaskName::Collapsed, Mode::Scratch) => {
            arms.extend(top_2(&["renorm_topk"]));
            arms.extend(["onehot", "raw_topk", "ste"].into_iter().flat_map(|name| against_collapse(&top_1(name))));
            arms.extend(limits_and_noise());
        }
        (TaskName::Digits, Mode::Scratch) => arms.extend(top_2(&["renorm_topk", "ste", "densemixer"])),
        (_, Mode::Tune) => {
            arms.iter_mut().for_each(start_at_the_teacher);
            arms.extend(["ste", "steep"].map(|name| distilled(top_1(name))));
            arms.extend(["raw_topk", "ste"].map(|name| near_the_router(top_1(name))));
            arms.push(top_2(&["ste"]).remove(0));
        }
    }
    if task != TaskName::Gradient {
        arms.extend(controls(mode));
    }
    arms
}

/// What every table has besides estimators: routing to one expert per token, and in tuning the teacher as it is.
pub fn controls(mode: Mode) -> Vec<Arm> {
    let share = if mode == Mode::Scratch { PREPARATION } else { 0.0 };
    let control = |name, route| Arm { route, ..named(top_1("onehot"), name) };
    let mut controls = vec![
        control("frozen", Route::Frozen),
        control("hash", Route::Hash),
        control("oracle", Route::Oracle),
        control("experts_only", Route::ExpertsAfter { share }),
    ];
    if mode == Mode::Tune {
        controls.push(Arm { route: Route::Untouched, ..named(Arm::teacher(), "untouched") });
    }
    controls
}

/// An arm with another name.
fn named(arm: Arm, name: impl Into<String>) -> Arm {
    Arm { name: name.into(), ..arm }
}

/// An estimator with its defaults and k = 1, where it has a k.
fn top_1(name: &str) -> Arm {
    let k = catalog::find(name).and_then(|row| (row.k != KRange::None).then_some(1));
    Arm::new(name, EstimatorConfig { name: name.to_owned(), k, params: BTreeMap::new() })
}

fn has_top_2(k: KRange) -> bool {
    matches!(k, KRange::From { .. } | KRange::BelowExperts)
}

fn top_2(names: &[&str]) -> Vec<Arm> {
    let arm = |name: &&str| {
        let mut arm = named(top_1(name), format!("{name}_k2"));
        arm.estimator.k = Some(2);
        arm
    };
    names.iter().map(arm).collect()
}

fn with(name: &str, suffix: &str, param: &str, value: Param) -> Arm {
    let mut arm = named(top_1(name), format!("{name}_{suffix}"));
    arm.estimator.params.insert(param.to_owned(), value);
    arm
}

fn annealed_to(name: &str, end: f64) -> Arm {
    with(name, &end.to_string(), "temperature", Param::Schedule(Schedule::new(Shape::Exp, 2.0, end)))
}

/// Settings that the claims in circulation are about.
fn variants() -> Vec<Arm> {
    let word = |word: &str| Param::Word(word.to_owned());
    let mut arms: Vec<Arm> = STEEP_ENDS.map(|end| annealed_to("steep", end)).into();
    arms.push(with("ste", "sampled", "sampled", Param::Flag(true)));
    arms.push(with("soft_topk", "logistic", "kernel", word("logistic")));
    arms.push(with("soft_topk", "clip", "kernel", word("clip")));
    arms.push(with("reinforce", "moving_average", "baseline", word("moving_average")));
    arms.push(with("reinforce", "self_critical", "baseline", word("self_critical")));
    arms.push(with("sparsemixer_v2", "star", "star", Param::Flag(true)));
    arms.push(balanced(top_1("raw_topk")));
    arms.push(balanced(top_1("ste")));
    arms
}

/// One temperature each: the task looks at an estimator at one point.
fn gradient_variants() -> Vec<Arm> {
    let constant = |name: &'static str| [1.0, 0.5, 0.1].map(|t: f64| with(name, &t.to_string(), "temperature", Param::Number(t)));
    let mut arms: Vec<Arm> = ["soft", "gumbel_st"].into_iter().flat_map(constant).collect();
    for mut arm in constant("gumbel_soft") {
        arm.estimator.params.insert("noise".to_owned(), Param::Number(1.0));
        arms.push(arm);
    }
    arms.push(with("ste", "sampled", "sampled", Param::Flag(true)));
    arms.push(with("reinmax", "1.5", "temperature", Param::Number(1.5)));
    for baseline in ["none", "moving_average", "self_critical"] {
        arms.push(with("reinforce", baseline, "baseline", Param::Word(baseline.to_owned())));
    }
    arms
}

fn balanced(arm: Arm) -> Arm {
    with_switch(&arm, BALANCE, "switch")
}

fn with_switch(arm: &Arm, weight: f64, suffix: &str) -> Arm {
    let losses = BTreeMap::from([("switch".to_owned(), Schedule::constant(weight))]);
    Arm { losses, ..named(arm.clone(), format!("{}+{suffix}", arm.name)) }
}

fn biased(arm: Arm) -> Arm {
    Arm { bias_rate: BIAS_RATE, ..named(arm.clone(), format!("{}+bias", arm.name)) }
}

fn against_collapse(arm: &Arm) -> Vec<Arm> {
    let treated = |suffix: &str, remedies: &[&str]| Arm {
        remedies: remedies.iter().map(|&remedy| remedy.to_owned()).collect(),
        ..named(arm.clone(), format!("{}+{suffix}", arm.name))
    };
    let raised = Arm { remedies: vec!["raise_balance".to_owned()], ..named(balanced(arm.clone()), format!("{}+switch+raise", arm.name)) };
    vec![
        balanced(arm.clone()),
        with_switch(arm, STRONG_BALANCE, "switch_0.1"),
        biased(arm.clone()),
        treated("bump", &["bias_bump"]),
        treated("reinit", &["reinit"]),
        treated("remedies", &["bias_bump", "reinit"]),
        raised,
    ]
}

fn limits_and_noise() -> Vec<Arm> {
    let arm = || top_1("raw_topk");
    let capacity = |overflow| Some(Capacity { factor: 1.25, overflow, order: Order::Position });
    let mut epsilon = named(arm(), "raw_topk+epsilon");
    epsilon.explore.epsilon = 0.02;
    let mut dropout = named(arm(), "raw_topk+dropout");
    dropout.explore.dropout = 0.1;
    vec![
        Arm { capacity: capacity(Overflow::Drop), ..named(arm(), "raw_topk+drop") },
        Arm { capacity: capacity(Overflow::Reroute), ..named(arm(), "raw_topk+reroute") },
        Arm { jitter: 0.1, ..named(arm(), "raw_topk+jitter") },
        epsilon,
        dropout,
    ]
}

fn distilled(arm: Arm) -> Arm {
    let mut arm = Arm { distill: 1.0, ..named(arm.clone(), format!("{}+distill", arm.name)) };
    start_at_the_teacher(&mut arm);
    arm
}

fn near_the_router(arm: Arm) -> Arm {
    let losses = BTreeMap::from([(AuxLoss::RouterKl.id().to_owned(), Schedule::constant(ROUTER_KL))]);
    Arm { losses, ..named(arm.clone(), format!("{}+{}", arm.name, AuxLoss::RouterKl.id())) }
}

/// Annealed temperatures begin at the teacher's, since it was trained with that.
fn start_at_the_teacher(arm: &mut Arm) {
    let row = catalog::find(&arm.estimator.name);
    let kind = row.and_then(|row| row.params.iter().find(|param| param.name == "temperature")).map(|param| param.kind);
    if let Some(Kind::Scheduled { default: Way::Along(shape, init, end), .. }) = kind
        && init != TUNING_TEMPERATURE
    {
        arm.estimator.params.insert("temperature".to_owned(), Param::Schedule(Schedule::new(shape, TUNING_TEMPERATURE, end)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_estimator_is_in_every_table_and_names_are_unique() {
        for task in TaskName::ALL {
            for mode in task.modes() {
                let arms = arms(task, *mode);
                let names: HashSet<&str> = arms.iter().map(|arm| arm.name.as_str()).collect();
                assert_eq!(names.len(), arms.len(), "{task:?} {mode:?}");
                for row in CATALOG.iter().filter(|row| left_out(task).iter().all(|(name, _)| *name != row.name)) {
                    assert!(arms.iter().any(|arm| arm.estimator.name == row.name && arm.route == Route::Learned), "{task:?}: {}", row.name);
                }
            }
        }
    }

    #[test]
    fn every_arm_passes_its_own_checks() {
        for task in TaskName::ALL {
            for mode in task.modes() {
                for arm in arms(task, *mode) {
                    let checked = arm.check(task.experts(), 1000, *mode);
                    assert!(checked.is_ok(), "{task:?}: {}: {:?}", arm.name, checked.err());
                }
            }
        }
    }

    #[test]
    fn both_k_are_compared_wherever_a_method_has_one() {
        let arms = arms(TaskName::Equal, Mode::Scratch);
        for row in CATALOG.iter().filter(|row| has_top_2(row.k)) {
            for k in [1, 2] {
                assert!(arms.iter().any(|arm| arm.estimator.name == row.name && arm.estimator.k == Some(k)), "{} at {k}", row.name);
            }
        }
    }

    #[test]
    fn annealing_in_tuning_begins_at_the_temperature_of_the_teacher() {
        let arms = arms(TaskName::Equal, Mode::Tune);
        let steep = arms.iter().find(|arm| arm.name == "steep").and_then(|arm| arm.estimator.params.get("temperature"));
        assert_eq!(steep, Some(&Param::Schedule(Schedule::new(Shape::Exp, 1.0, 0.1))));
        assert!(arms.iter().any(|arm| arm.name == "soft" && arm.estimator.params.is_empty()));
    }
}
