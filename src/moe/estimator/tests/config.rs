//! Settings: every mistake has its own words, and every row can be built from its defaults.

use super::*;
use crate::{
    error::Result,
    moe::estimator::{
        ChoiceChange, Needs,
        catalog::{Range, Row},
    },
    schedule::{Schedule, Shape},
};

const EXPERTS: usize = 8;

/// Reads the settings as a recipe has them.
fn read(toml: &str, purpose: Purpose) -> Result<EstimatorSpec> {
    let config: EstimatorConfig = toml::from_str(toml).unwrap();
    EstimatorSpec::new(&config, EXPERTS, STEPS, purpose)
}

#[test]
fn mistakes_are_named() {
    let names = CATALOG.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
    let unknown = |name: &str, guess: &str| format!("routing.estimator: '{name}' is unknown; {guess}one of {names}");
    let renorm = |field: &str| {
        let message =
            "renormalised top-1 has weight 1 for every router, so the router gets no gradient; use raw_topk, ste or soft, or k = 2";
        format!("routing.{field}: {message}")
    };
    for (toml, message) in [
        ("name = 'stee'", unknown("stee", "did you mean ste? ").as_str()),
        ("name = 'softmax'", unknown("softmax", "").as_str()),
        ("name = ''", unknown("", "").as_str()),
        ("name = 'ste'\nparams.temperature = 0", "routing.temperature: 0 is no value for it: must be above 0 at every step"),
        ("name = 'ste'\nparams.temperature = -1.5", "routing.temperature: -1.5 is no value for it: must be above 0 at every step"),
        ("name = 'ste'\nparams.temperature = nan", "routing.temperature: NaN is no value for it: must be above 0 at every step"),
        ("name = 'soft'\nparams.temperature = inf", "routing.temperature: inf is no value for it: must be above 0 at every step"),
        (
            "name = 'steep'\nparams.temperature = { init = 2.0, final = 0.0 }",
            "routing.temperature: 0 is no value for it: must be above 0 at every step",
        ),
        (
            "name = 'steep'\nparams.temperature = { init = 2.0, final = 1e-60 }",
            "routing.temperature: init and final must be at least 1e-30 (an exponential schedule cannot reach 0: use linear)",
        ),
        (
            "name = 'steep'\nparams.temperature = { init = 2.0, final = 0.1, until = 5000 }",
            "routing.temperature: `until` = 5000 is past the end of the run, 100 steps",
        ),
        (
            "name = 'steep'\nparams.temperature = { init = 2.0, final = 0.1, begin = 50, until = 40 }",
            "routing.temperature: `begin` = 50 is not before `until` = 40",
        ),
        ("name = 'soft'\nparams.temperature = 1e31", "routing.temperature: init and final must be at most 1e30"),
        (
            "name = 'ste'\nparams.temperature = { schedule = 'constant', init = 2.0, final = 0.1 }",
            "routing.temperature: a constant schedule stays at init = 2: make final the same, or choose another schedule",
        ),
        ("name = 'steep'\nparams.temperature = 'cold'", "routing.temperature: must be a number, or a schedule with init and final"),
        ("name = 'soft_topk'\nparams.width = 0", "routing.width: 0 is no value for it: must be above 0 at every step"),
        ("name = 'gumbel_soft'\nparams.noise = -1", "routing.noise: -1 is no value for it: must be at least 0 at every step"),
        ("name = 'ste'\nk = 9", "routing.k: 9 is more than the 8 experts"),
        ("name = 'ste'\nk = 0", "routing.k: must be at least 1"),
        ("name = 'steep_sigmoid'\nk = 8", "routing.k: steep_sigmoid needs fewer than all 8 experts"),
        ("name = 'soft_topk'\nk = 8", "routing.k: soft_topk needs fewer than all 8 experts"),
        ("name = 'reinmax'\nk = 2", "routing.k: reinmax routes to one expert"),
        ("name = 'gumbel_st'\nk = 2", "routing.k: gumbel_st routes to one expert"),
        ("name = 'soft'\nk = 1", "routing.k: soft has none: it weighs all experts"),
        ("name = 'reinmax'\nparams.temperature = 0.5", "routing.temperature: 0.5 is no value for it: must be at least 1 at every step"),
        ("name = 'entmax'\nparams.alpha = 1.0", "routing.alpha: 1 is no value for it: must be above 1 and at most 2 at every step"),
        ("name = 'entmax'\nparams.alpha = 2.5", "routing.alpha: 2.5 is no value for it: must be above 1 and at most 2 at every step"),
        ("name = 'entmax'\nparams.alpha = { init = 1.5, final = 2.0 }", "routing.alpha: must be a number, the same for the whole run"),
        ("name = 'default_moe'\nparams.ema = 1.0", "routing.ema: 1 is no value for it: must be above 0 and below 1 at every step"),
        ("name = 'reinforce'\nparams.samples = 1", "routing.samples: must be at least 2: leave_one_out takes the mean of the others"),
        (
            "name = 'reinforce'\nparams.samples = 2.5",
            "routing.samples: 2.5 is no value for it: must be a whole number from 1 to 65535 at every step",
        ),
        (
            "name = 'reinforce'\nparams.baseline = 'critic'",
            "routing.baseline: must be one of none, moving_average, leave_one_out, self_critical",
        ),
        ("name = 'densemixer'\nparams.form = true", "routing.form: must be one of raw, renorm"),
        ("name = 'ste'\nparams.sampled = 'yes'", "routing.sampled: must be true or false"),
        ("name = 'ste'\nparams.alpha = 2.0", "routing.alpha: ste has no such parameter; it has temperature, sampled"),
        ("name = 'raw_topk'\nparams.temperature = 1.0", "routing.temperature: raw_topk has no such parameter; it has none"),
        ("name = 'renorm_topk'\nk = 1", renorm("k").as_str()),
        ("name = 'noisy_topk'\nk = 1\nparams.weights = 'renorm'", renorm("weights").as_str()),
        (
            "name = 'reinforce'\nparams.decay = 0.9",
            "routing.decay: has no effect because only baseline = \"moving_average\" has an average; remove it",
        ),
        (
            "name = 'onehot'",
            "routing.estimator: onehot is only for the laboratory: its router gets no gradient: it is a baseline of `hardmax compare`",
        ),
        (
            "name = 'dselect_k'",
            "routing.estimator: dselect_k is only for the laboratory: a checkpoint cannot hold its router, whose outputs are not one logit per expert",
        ),
    ] {
        assert_eq!(read(toml, Purpose::Train).unwrap_err().to_string(), message, "{toml}");
    }
    let laboratory = |name| read(&format!("name = '{name}'\nparams.smear = 1"), Purpose::Laboratory).unwrap_err().to_string();
    assert_eq!(laboratory("smear"), "routing.smear: smear has no such parameter; it has temperature, dropout");
    let smear = read("name = 'smear'\nparams.dropout = 1.0", Purpose::Laboratory).unwrap_err();
    assert_eq!(smear.to_string(), "routing.dropout: 1 is no value for it: must be at least 0 and below 1 at every step");
}

/// What draws its experts has a gradient for these draws only.
#[test]
fn choices_that_a_sampled_gradient_does_not_know_of_are_refused() {
    let check = |spec: EstimatorSpec, draws: bool| {
        let name = spec.row().name;
        let start = format!("routing.it: {name} draws its experts, and its gradient is made for");
        let refused = |change| match spec.check_choice(change, "routing.it") {
            Ok(()) => false,
            Err(error) => error.to_string().starts_with(&start),
        };
        assert_eq!(refused(ChoiceChange::Epsilon), draws, "{name}");
        // The score is that of the biased choice.
        assert_eq!(refused(ChoiceChange::Bias), draws && name != "reinforce", "{name}");
        let dropout = spec.check_choice(ChoiceChange::Dropout, "routing.it").map_err(|error| error.to_string());
        let products = "routing.it: the weights of dselect_k are products of bits that experts share: none can be left out of them";
        assert_eq!(dropout, if name == "dselect_k" { Err(products.to_owned()) } else { Ok(()) }, "{name}");
    };
    for row in CATALOG {
        let draws = ["reinmax", "sparsemixer_v2", "gumbel_st", "gumbel_topk", "reinforce"].contains(&row.name);
        check(super::spec(row.name, None, &[], EXPERTS), draws);
    }
    check(super::spec("ste", None, &[("sampled", Param::Flag(true))], EXPERTS), true);
}

#[test]
fn the_laboratory_takes_the_broken_ones() {
    for toml in ["name = 'renorm_topk'\nk = 1", "name = 'onehot'", "name = 'dselect_k'", "name = 'smear'"] {
        read(toml, Purpose::Laboratory).unwrap();
    }
}

#[test]
fn every_row_that_a_recipe_may_name_trains_with_its_defaults() {
    for row in CATALOG {
        let config = EstimatorConfig { name: row.name.into(), k: None, params: Default::default() };
        let trained = EstimatorSpec::new(&config, EXPERTS, STEPS, Purpose::Train);
        assert_eq!(trained.is_ok(), row.exports(), "{}: {trained:?}", row.name);
        // What a row builds from are its own parameters, at every step.
        let spec = EstimatorSpec::new(&config, EXPERTS, STEPS, Purpose::Laboratory).unwrap();
        for step in [0, STEPS / 2, STEPS] {
            spec.at(step, STEPS);
            spec.regulariser(step, STEPS);
        }
        assert!(spec.k().is_none_or(|k| k == spec.at(0, STEPS).k() || row.name == "remoe"), "{}", row.name);
    }
}

#[test]
fn names_and_words_are_told_apart_and_texts_are_there() {
    let mut names: Vec<&str> = CATALOG.iter().map(|row| row.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), CATALOG.len());
    for Row { name, title, forward, backward, source, note, params, .. } in CATALOG {
        assert!([title, forward, backward, source, note].iter().all(|text| !text.is_empty()), "{name}");
        assert!(params.iter().all(|param| !param.doc.is_empty() && param.name != "k"), "{name}");
    }
}

#[test]
fn schedules_are_followed() {
    let spec = read("name = 'steep'\nparams.temperature = { init = 2.0, final = 0.5, begin = 20, until = 60 }", Purpose::Train).unwrap();
    let at = |step| spec.number_at("temperature", step, STEPS).unwrap();
    assert_eq!((at(0), at(20), at(60), at(100)), (2.0, 2.0, 0.5, 0.5));
    assert!((at(40) - 1.0).abs() < 1e-12);
    assert_ne!(spec.at(20, STEPS), spec.at(60, STEPS));
    assert_eq!(spec.schedule("temperature").unwrap().last(), 0.5);
    assert_eq!((spec.number_at("noise", 0, STEPS), spec.k()), (None, None));
    let steep = super::spec("steep", None, &[], EXPERTS);
    assert_eq!(steep.schedule("temperature"), Some(Schedule::new(Shape::Exp, 2.0, 0.1)));
}

#[test]
fn configurations_survive_being_written() {
    for toml in [
        "name = 'ste'\nk = 2\nparams.temperature = 0.5\nparams.sampled = true",
        "name = 'soft_topk'\nparams.kernel = 'clip'\nparams.width = { init = 0.5, final = 0.1, schedule = 'linear' }",
        "name = 'soft'",
    ] {
        let config: EstimatorConfig = toml::from_str(toml).unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<EstimatorConfig>(&json).unwrap(), config, "{json}");
    }
    let precise = toml::from_str::<EstimatorConfig>("name = 'steep'\nparams.temperature = { start = 2.0 }").unwrap_err();
    assert!(precise.to_string().contains("unknown field `start`"), "{precise}");
    assert!(toml::from_str::<EstimatorConfig>("name = 'ste'\nparams.temperature = [1.0]").is_err());
}

#[test]
fn needs_follow_from_the_parts() {
    let needs = |name| spec(name, None, &[], EXPERTS).at(0, STEPS).needs();
    let nothing = Needs { dense: false, noise: false, state: false, outputs: false, backward: false, merge: false };
    assert_eq!(needs("raw_topk"), nothing);
    assert_eq!(needs("soft"), Needs { dense: true, ..nothing });
    assert_eq!(needs("ste"), Needs { dense: true, backward: true, ..nothing });
    assert_eq!(needs("ste_sparse"), Needs { backward: true, ..nothing });
    assert_eq!(needs("noisy_topk"), Needs { noise: true, outputs: true, ..nothing });
    assert_eq!(needs("default_moe"), Needs { state: true, ..nothing });
    assert_eq!(needs("smear"), Needs { noise: true, merge: true, ..nothing });
    assert_eq!(needs("dselect_k"), Needs { outputs: true, ..nothing });
    assert_eq!(needs("remoe"), Needs { state: true, ..nothing });
    assert_eq!(needs("entmax"), Needs { backward: true, ..nothing });
    assert_eq!(needs("reinforce"), Needs { noise: true, backward: true, ..nothing });
}

#[test]
fn ranges_hold_at_their_ends() {
    let contains = |range: Range, x: f64| check(range, x).is_ok();
    for (range, inside, outside) in [
        (Range::Positive, vec![1e-9, 1e9], vec![0.0, -1.0, f64::INFINITY]),
        (Range::NotNegative, vec![0.0, 1.0], vec![-1e-9, f64::NAN]),
        (Range::AtLeast(1.0), vec![1.0, 2.0], vec![0.999]),
        (Range::Between(0.0, 1.0), vec![0.5], vec![0.0, 1.0]),
        (Range::Probability, vec![0.0, 0.99], vec![1.0, -0.1]),
        (Range::Alpha, vec![1.001, 2.0], vec![1.0, 2.001]),
        (Range::Count(1), vec![1.0, 65535.0], vec![0.0, 1.5, 65536.0]),
    ] {
        inside.iter().for_each(|x| assert!(contains(range, *x), "{range:?}: {x}"));
        outside.iter().for_each(|x| assert!(!contains(range, *x), "{range:?}: {x}"));
    }
}

fn check(range: Range, x: f64) -> std::result::Result<(), String> {
    range.problem(&Schedule::constant(x), STEPS).map_or(Ok(()), Err)
}
