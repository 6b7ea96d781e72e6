//! A small run from text to checkpoint: reproducible, resumable, and served as it was evaluated.

mod over;

use std::{fs, path::Path, sync::Arc};

use candle_core::{Device, Tensor};

use super::{
    config::TrainConfig,
    data::{Stream, step_rng},
    evaluate::evaluate,
    export::export,
    finding::Finding,
    learner::{Learner, Setup, Text},
    log::{self, Record, StepRecord},
    routing::{RoutingConfig, RunShape},
    trainable::{Part, Trainable},
    trainer::{Trained, Trainer, folded, log_path},
};
use crate::{
    error::ErrorKind,
    model::{
        ReferenceRouting,
        load::{DeviceKind, WeightType, load},
        weights::FeedForwardWeights,
    },
    moe::{
        RoutingStats,
        collapse::Health,
        estimator::{Expected, Purpose, catalog},
        policy::RoutingChoice,
        remedy::{Action, Remedy},
    },
};

const RECIPE: &str = r#"
output = "out"
work = "work"
[data]
train = ["train.txt"]
heldout = ["heldout.txt"]
separator = "\n\n"
vocab_size = 300
[model]
hidden_size = 16
layers = 2
heads = 2
kv_heads = 1
experts = 3
expert_width = 8
context = 16
rope_theta = 10000.0
tied_head = true
[routing]
estimator = "gumbel_soft"
temperature = { schedule = "exp", init = 2.0, final = 0.5 }
noise = { schedule = "linear", init = 1.0, final = 0.0 }
losses = { switch = 0.01, router_z = 0.0001 }
serve_k = 1
[optimizer]
learning_rate = 1e-2
final_ratio = 0.1
warmup_steps = 2
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
clip_norm = 1.0
[run]
steps = 12
batch = 4
seed = 5
eval_every = 5
eval_tokens = 64
save_every = 4
"#;

/// A folder with text and the recipe, changed by `edit`.
fn folder(edit: impl Fn(String) -> String) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let line = |i: usize| format!("the {} {} sat on the {} mat.", ["old", "new", "red"][i % 3], ["cat", "dog", "ox"][i / 3 % 3], i % 7);
    let text: Vec<String> = (0..200).map(line).collect();
    fs::write(dir.path().join("train.txt"), text.join("\n\n")).unwrap();
    fs::write(dir.path().join("heldout.txt"), text[..20].join("\n\n")).unwrap();
    fs::write(dir.path().join("train.toml"), edit(RECIPE.into())).unwrap();
    dir
}

fn config(dir: &Path) -> TrainConfig {
    TrainConfig::read(&dir.join("train.toml")).unwrap()
}

fn train(dir: &Path, resume: bool) -> Trained {
    Trainer::new(config(dir), resume).unwrap().run().unwrap()
}

fn values(trained: &Trained) -> Vec<(String, Vec<f32>)> {
    weights(&trained.model)
}

fn weights(model: &Trainable) -> Vec<(String, Vec<f32>)> {
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    model.parameters().iter().map(|p| (p.name.clone(), flat(p.var.as_tensor()))).collect()
}

fn losses(dir: &Path) -> Vec<f64> {
    steps(dir).into_iter().map(|step| step.lm_loss).collect()
}

fn steps(dir: &Path) -> Vec<StepRecord> {
    records(dir).into_iter().filter_map(|record| if let Record::Step(step) = record { Some(step) } else { None }).collect()
}

fn records(dir: &Path) -> Vec<Record> {
    log::read(&log_path(&config(dir))).unwrap()
}

fn heldout(config: &TrainConfig, tokenizer: &tokenizers::Tokenizer) -> Vec<u32> {
    let documents = super::data::read_documents(&config.data.heldout, &config.data.separator).unwrap();
    super::data::tokenize(&documents, tokenizer, tokenizer.token_to_id("<|endoftext|>").unwrap()).unwrap()
}

#[test]
fn same_seed_same_weights_and_the_loss_falls() {
    let (a, b) = (folder(|r| r), folder(|r| r));
    assert_eq!(values(&train(a.path(), false)), values(&train(b.path(), false)));
    let losses = losses(a.path());
    assert_eq!(losses.len(), 12);
    assert!(losses[11] < losses[0] - 0.5, "{losses:?}");
    let c = folder(|r| r.replace("seed = 5", "seed = 6"));
    assert_ne!(values(&train(a.path(), true)), values(&train(c.path(), false)), "another seed, other weights");
}

/// The recipe with other routing.
fn routed(lines: &str) -> impl Fn(String) -> String {
    let lines = format!("[routing]\n{lines}\n[optimizer]");
    move |recipe: String| {
        let (before, rest) = recipe.split_once("[routing]").unwrap();
        let (_, after) = rest.split_once("[optimizer]").unwrap();
        format!("{before}{lines}{after}")
    }
}

/// Biases, running means, baselines, penalties and remedies are part of the state too.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let recipes: [Box<dyn Fn(String) -> String>; 4] = [
        Box::new(|recipe| recipe),
        Box::new(routed(
            "estimator = \"ste\"\nserve_k = 1\nbias_rate = 0.01\nremedies = [\"bias_bump\", \"reinit\"]\nexplore = { jitter = 0.1, epsilon = 0.1 }",
        )),
        Box::new(routed("estimator = \"default_moe\"\nk = 1\nserve_k = 1\ncapacity = { factor = 1.25, overflow = \"reroute\" }")),
        Box::new(routed("estimator = \"reinforce\"\nbaseline = \"moving_average\"\nsamples = 2\nserve_k = 1\nlosses = { switch = 0.01 }")),
    ];
    for recipe in recipes {
        let (whole, cut) = (folder(&recipe), folder(&recipe));
        let wanted = train(whole.path(), false);
        let mut interrupted = Trainer::new(config(cut.path()), false).unwrap();
        interrupted.run_until(6).unwrap();
        drop(interrupted);
        let found = train(cut.path(), true);
        assert_eq!(values(&found), values(&wanted));
        assert_eq!(losses(cut.path()), losses(whole.path()), "the log has each step once");
    }
}

/// Changes a saved state so that in no layer a token goes to expert 0: rows 0, v and -v, of which one of the last wins.
fn starve(state: &Path) {
    let file = state.join("tensors.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    for (_, router) in tensors.iter_mut().filter(|(name, _)| name.ends_with("router.value")) {
        let row = |scale: f32| (0..router.dim(1).unwrap()).map(move |i| scale * (40.0 + (i % 5) as f32));
        let rows: Vec<f32> = [0.0, 1.0, -1.0].into_iter().flat_map(row).collect();
        *router = Tensor::from_vec(rows, router.shape(), &Device::Cpu).unwrap();
    }
    candle_core::safetensors::save(&tensors, &file).unwrap();
}

fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy_files(&path, &to);
        } else {
            fs::copy(&path, to).unwrap();
        }
    }
}

/// What the monitor has seen, how long ago a remedy acted, raised weights and a bias that fades are parts of the state:
/// one cut lies between two acts, the other one after them.
#[test]
fn a_run_with_remedies_is_resumed_as_if_it_had_not_stopped() {
    const CUTS: [usize; 2] = [12, 32];
    let recipe = |recipe: String| {
        let lines = "estimator = \"raw_topk\"\nserve_k = 1\nlosses = { switch = 0.01 }\n\
                     remedies = [\"bias_bump\", \"reinit\", \"raise_balance\"]\nexplore = { jitter = 0.01 }";
        routed(lines)(recipe).replace("steps = 12", "steps = 60").replace("eval_every = 5", "eval_every = 30")
    };
    let (whole, cut) = (folder(recipe), folder(recipe));
    let state = |dir: &Path| dir.join("work/training-state");
    let mut first = config(whole.path());
    first.run.save_every = 1;
    Trainer::new(first, false).unwrap().run_until(1).unwrap();
    starve(&state(whole.path()));
    copy_files(&whole.path().join("work"), &cut.path().join("work"));

    let wanted = train(whole.path(), true);
    CUTS.iter().for_each(|cut_at| Trainer::new(config(cut.path()), true).unwrap().run_until(*cut_at).unwrap());
    let found = train(cut.path(), true);
    assert_eq!(values(&found), values(&wanted));
    for file in ["state.json", "tensors.safetensors"] {
        let read = |dir: &Path| fs::read(state(dir).join(file)).unwrap();
        assert!(read(cut.path()) == read(whole.path()), "{file}: moments, monitors, treatments and biases");
    }
    let timeless = |dir: &Path| {
        let untimed = |record| match record {
            Record::Step(step) => Record::Step(StepRecord { tokens_per_second: 0.0, ..step }),
            other => other,
        };
        records(dir).into_iter().map(untimed).collect::<Vec<_>>()
    };
    assert_eq!(timeless(cut.path()), timeless(whole.path()));

    let acted: Vec<(usize, Action)> =
        records(cut.path()).into_iter().filter_map(|r| if let Record::Remedy(r) = r { Some((r.step, r.action)) } else { None }).collect();
    let between = |steps: std::ops::Range<usize>| acted.iter().filter(move |(step, _)| steps.contains(step)).map(|(_, action)| *action);
    assert_eq!(between(0..CUTS[0]).collect::<Vec<_>>(), [Action::RaiseBalance { factor: 2.0 }; 2], "{acted:?}");
    assert!(between(CUTS[0]..CUTS[1]).any(|action| matches!(action, Action::BumpBias { expert: 0, .. })), "{acted:?}");
    let ill = |r: &Record| matches!(r, Record::Finding(r) if r.finding.health > Some(Health::Healthy));
    assert!(records(cut.path()).iter().filter(|record| ill(record)).count() >= 2, "one in each layer at least");
    let steps = steps(cut.path());
    assert!(steps[CUTS[0]].health > Some(Health::Healthy) && steps[CUTS[0]].selection_bias == 0.0, "{:?}", steps[CUTS[0]]);
    assert!(steps[CUTS[1]].selection_bias > 0.0, "{:?}", steps[CUTS[1]]);
    assert_eq!(steps[59].selection_bias, 0.0);
}

/// A checkpoint has no place for the bias: it has done its work before the end, and what is trained last is what is served.
#[test]
fn a_selection_bias_is_gone_before_the_end() {
    let dir = folder(|recipe| routed("estimator = \"ste\"\nserve_k = 1\nbias_rate = 0.05")(recipe).replace("steps = 12", "steps = 20"));
    train(dir.path(), false);
    let biases: Vec<f64> = steps(dir.path()).iter().map(|step| step.selection_bias).collect();
    assert!(biases[..12].iter().all(|bias| *bias >= 0.049), "{biases:?}");
    assert!(biases[12..18].windows(2).all(|pair| pair[1] < pair[0]), "{biases:?}");
    assert_eq!(biases[18..], [0.0, 0.0]);
    let plan = |purpose| {
        let remedies = vec!["bias_bump".to_owned(), "reinit".to_owned()];
        let routing = RoutingConfig { remedies, ..config(dir.path()).routing };
        routing.plan(RunShape { experts: 3, steps: 100, purpose, teacher: false }).unwrap()
    };
    let bumps = |purpose| [0, 80, 99].map(|step| plan(purpose).remedies(step).has(Remedy::BiasBump));
    assert_eq!(bumps(Purpose::Train), [true, true, false], "none that would stay");
    assert_eq!((bumps(Purpose::Laboratory), plan(Purpose::Laboratory).bias_share(99)), ([true; 3], 1.0), "measured with its bias");
    assert!(plan(Purpose::Train).remedies(99).has(Remedy::Reinit));
}

#[test]
fn a_step_names_the_noise_and_the_limits_that_it_had() {
    let explore = "explore = { jitter = 0.1, epsilon = { schedule = \"linear\", init = 0.2, final = 0.0 }, dropout = 0.05 }";
    let steps_of = |lines: &str| {
        let dir = folder(routed(lines));
        train(dir.path(), false);
        steps(dir.path())
    };
    let found = steps_of(&format!("estimator = \"raw_topk\"\nserve_k = 1\n{explore}\ncapacity = {{ factor = 0.5 }}"));
    let noise = |step: &StepRecord| (step.noise_kind.clone(), step.noise, step.temperature, step.jitter, step.epsilon, step.dropout);
    assert_eq!(noise(&found[0]), ("none".into(), 0.0, 1.0, 0.1, 0.2, 0.05));
    assert_eq!(noise(&found[11]), ("none".into(), 0.0, 1.0, 0.1, 0.0, 0.05));
    for step in &found {
        // 64 tokens in 2 layers, room for 11 rows in each of 3 experts.
        assert!(step.dropped >= 2 * 31 && step.rerouted == 0, "{step:?}");
        assert_eq!(step.executed_per_token, (128 - step.dropped) as f64 / 128.0);
    }
    let found = steps_of(
        "estimator = \"ste\"\nsampled = true\ntemperature = 0.5\nserve_k = 1\ncapacity = { factor = 1.0, overflow = \"reroute\" }",
    );
    assert!(found.iter().all(|step| noise(step) == ("gumbel".into(), 0.5, 0.5, 0.0, 0.0, 0.0)));
    assert!(found.iter().all(|step| step.dropped == 0) && found.iter().any(|step| step.rerouted > 0));
}

/// With such steps weights are no numbers after the first one.
#[test]
fn a_run_that_learns_nothing_more_is_given_up() {
    let hopeless = |limit: usize| {
        let limit = format!("save_every = 4\nskip_limit = {limit}");
        folder(|recipe| recipe.replace("learning_rate = 1e-2", "learning_rate = 1e30").replace("save_every = 4", &limit))
    };
    let dir = hopeless(3);
    let error = Trainer::new(config(dir.path()), false).unwrap().run().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    let text = error.to_string();
    assert!(text.starts_with("no gradient was finite in the last 3 steps (run.skip_limit = 3)"), "{text}");
    assert!(text.contains("optimizer.learning_rate"), "{text}");
    let skipped: Vec<bool> = steps(dir.path()).iter().map(|step| step.grad_norm.is_none()).collect();
    assert_eq!((skipped.len(), skipped[0], &skipped[skipped.len() - 3..]), (4, false, &[true; 3][..]));
    // The count goes on where the run does.
    let dir = hopeless(7);
    Trainer::new(config(dir.path()), false).unwrap().run_until(4).unwrap();
    assert!(Trainer::new(config(dir.path()), true).unwrap().run().unwrap_err().to_string().contains("last 7 steps"));
    assert_eq!(steps(dir.path()).len(), 8);
    let dir = hopeless(100);
    train(dir.path(), false);
    assert_eq!(steps(dir.path()).iter().filter(|step| step.grad_norm.is_none()).count(), 11, "below the limit");
}

/// So that a balance loss, and raising it, is no setting without effect.
#[test]
fn a_balance_loss_moves_what_comes_before_a_frozen_router() {
    let query = |weight: f64| {
        let dir = folder(routed(&format!("estimator = \"ste\"\nserve_k = 1\ntrain = \"experts\"\nlosses = {{ switch = {weight:?} }}")));
        values(&train(dir.path(), false)).into_iter().find(|(name, _)| name == "layers.0.query").unwrap()
    };
    assert_ne!(query(0.0), query(0.5));
}

/// Every row of the catalogue that a checkpoint can hold, by its name: trained, counted, saved, and served as evaluated.
#[test]
fn every_estimator_trains_and_is_served_as_it_was_evaluated() {
    let rows: Vec<_> = catalog::CATALOG.iter().filter(|row| row.exports()).collect();
    assert_eq!((rows.len(), catalog::CATALOG.len()), (18, 24), "as README and CHANGELOG say");
    for row in rows {
        let dir = folder(routed(&format!("estimator = \"{}\"\nserve_k = 1\nlosses = {{ router_z = 1e-4 }}", row.name)));
        let trained = train(dir.path(), false);
        let config = config(dir.path());
        export(&config, &trained).unwrap();
        let loaded = load(&config.output, DeviceKind::Cpu, WeightType::Auto, false).unwrap();
        assert_eq!((loaded.decoder.spec().estimator.as_str(), loaded.decoder.spec().reference), (row.name, trained.spec.reference));
        let text = heldout(&config, &loaded.checkpoint.tokenizer().unwrap());
        let perplexity = |routing| evaluate(&loaded.decoder, &text, config.model.context, routing).unwrap().perplexity;
        assert_eq!(perplexity(RoutingChoice::Native), trained.evaluation.top1_perplexity, "{}", row.name);
        assert_eq!(perplexity(trained.spec.reference.choice()), trained.evaluation.reference_perplexity, "{}", row.name);
        let counted = steps(dir.path()).into_iter().map(|step| step.executed_per_token);
        match trained.estimator.executed_per_token(config.model.experts) {
            Expected::Exactly(n) => assert!(counted.clone().all(|counted| counted == n as f64), "{}", row.name),
            Expected::AtMost(n) => assert!(counted.clone().all(|counted| counted > 0.0 && counted <= n as f64), "{}", row.name),
            Expected::Merged => assert!(counted.clone().all(|counted| counted == 1.0), "{}", row.name),
        }
    }
}

#[test]
fn a_frozen_part_is_the_same_to_the_bit_after_a_run() {
    for (learns, moved) in [("experts", [false, true, true]), ("router", [true, false, false]), ("all", [true; 3])] {
        let dir = folder(routed(&format!("estimator = \"ste\"\nserve_k = 1\ntrain = \"{learns}\"")));
        let trained = train(dir.path(), false);
        let mut random = step_rng(config(dir.path()).run.seed, 0, Stream::Init);
        let fresh = Trainable::init(&trained.spec, |experts| experts, &mut random, &Device::Cpu).unwrap();
        let (before, after) = (weights(&fresh), values(&trained));
        for (name, moved) in ["layers.0.router", "layers.1.experts.gate_up", "layers.0.query"].into_iter().zip(moved) {
            let of = |values: &[(String, Vec<f32>)]| values.iter().find(|(found, _)| found == name).unwrap().1.clone();
            assert_eq!(of(&before) != of(&after), moved, "{learns}: {name}");
        }
    }
}

/// Every expert begins with the same noise, whatever the token.
#[test]
fn the_noise_of_a_router_begins_the_same_for_all() {
    let config = config(folder(routed("estimator = \"noisy_topk\"\nserve_k = 1")).path());
    let plan = config.plan().unwrap();
    let spec = Arc::new(config.spec(&plan, 40));
    let learner = Learner::new(Setup { spec, plan, optimizer: config.optimizer.clone(), seed: 3 }).unwrap();
    let routers: Vec<_> = weights(learner.model()).into_iter().filter(|(name, _)| name.ends_with(".router")).collect();
    assert_eq!(routers.len(), 2);
    for (name, rows) in routers {
        let (logits, noise) = rows.split_at(rows.len() / 2);
        assert!(logits.iter().all(|w| *w != 0.0) && noise.iter().all(|w| *w == 0.0), "{name}");
    }
}

/// All rows of the routers are equal, so that every token goes to expert 0; the un-weighted one-hot gives them no gradient.
#[test]
fn a_dead_expert_is_made_anew_and_lives() {
    let run = |remedies: &[&str]| {
        let config = config(folder(routed("estimator = \"ste\"\nserve_k = 1")).path());
        let routing = RoutingConfig {
            estimator: "onehot".into(),
            remedies: remedies.iter().map(|&remedy| remedy.to_owned()).collect(),
            ..config.routing.clone()
        };
        let shape = RunShape { experts: 3, steps: 12, purpose: Purpose::Laboratory, teacher: false };
        let plan = routing.plan(shape).unwrap();
        let spec = Arc::new(config.spec(&plan, 40));
        let mut learner = Learner::new(Setup { spec, plan, optimizer: config.optimizer.clone(), seed: 3 }).unwrap();
        for parameter in learner.model().parameters().iter().filter(|parameter| parameter.part == Part::Router) {
            let first = parameter.var.as_detached_tensor().narrow(0, 0, 1).unwrap();
            parameter.var.set(&first.repeat((3, 1)).unwrap().contiguous().unwrap()).unwrap();
        }
        let inputs: Vec<u32> = (0..128).map(|i| (i * i + 7 * i) as u32 % 40).collect();
        let text = Text { inputs: &inputs, targets: &inputs, length: 16, route: None, teacher: None };
        let reports: Vec<_> = (0..6).map(|step| learner.step(step, text, 1e-3).unwrap()).collect();
        let actions: Vec<_> = reports.iter().flat_map(|report| &report.actions).copied().collect();
        let findings: Vec<_> = reports.iter().flat_map(|report| &report.findings).copied().collect();
        (actions, reports.last().unwrap().layers.iter().map(RoutingStats::dead).sum::<usize>(), findings)
    };
    let collapsed = Finding { health: Some(Health::Collapsed), dead_router: false };
    assert_eq!(run(&[]), (Vec::new(), 4, vec![(0, collapsed), (1, collapsed)]), "two of three experts in both layers, found once");
    let (actions, dead, _) = run(&["reinit"]);
    assert!(actions.iter().all(|(_, action)| matches!(action, Action::Reinit { donor: 0, .. })) && actions.len() == 4, "{actions:?}");
    assert_eq!(dead, 0);
}

#[test]
fn a_raised_balance_weight_is_in_force() {
    let run = |factor: f64| {
        let config = config(folder(routed("estimator = \"raw_topk\"\nserve_k = 1\nlosses = { switch = 0.01 }")).path());
        let plan = config.plan().unwrap();
        let spec = Arc::new(config.spec(&plan, 40));
        let mut learner = Learner::new(Setup { spec, plan, optimizer: config.optimizer.clone(), seed: 3 }).unwrap();
        let treatment = serde_json::json!({ "last": {}, "factor": factor });
        let mut captured = learner.capture().unwrap();
        captured.tensors.values_mut().for_each(|tensor| *tensor = tensor.copy().unwrap());
        captured.memory.watch.iter_mut().for_each(|watch| watch.treatment = serde_json::from_value(treatment.clone()).unwrap());
        learner.reinstate(captured).unwrap();
        let inputs: Vec<u32> = (0..64).map(|i| (i * i + 7 * i) as u32 % 40).collect();
        let text = Text { inputs: &inputs, targets: &inputs, length: 16, route: None, teacher: None };
        (0..3).for_each(|step| _ = learner.step(step, text, 1e-2).unwrap());
        weights(learner.model())
    };
    assert_eq!(run(1.0), run(1.0));
    assert_ne!(run(1.0), run(8.0));
}

#[test]
fn a_run_killed_between_two_renames_is_resumed() {
    let (whole, cut) = (folder(|r| r), folder(|r| r));
    let wanted = train(whole.path(), false);
    let mut interrupted = Trainer::new(config(cut.path()), false).unwrap();
    interrupted.run_until(8).unwrap();
    drop(interrupted);
    let state = cut.path().join("work/training-state");
    fs::rename(&state, state.with_extension("old")).unwrap();
    let resumed = Trainer::new(config(cut.path()), true).unwrap();
    assert!(resumed.summary().contains("step 8 of 12"), "{}", resumed.summary());
    assert_eq!(values(&resumed.run().unwrap()), values(&wanted));
    assert_eq!(losses(cut.path()), losses(whole.path()));
}

#[test]
fn one_run_at_a_time_in_a_folder() {
    let dir = folder(|r| r);
    let first = Trainer::new(config(dir.path()), false).unwrap();
    let refused = Trainer::new(config(dir.path()), true).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert!(refused.to_string().contains("another run writes to this folder"), "{refused}");
    drop(first);
    Trainer::new(config(dir.path()), true).unwrap();
}

#[test]
fn an_output_that_cannot_be_saved_to_is_refused_before_the_run() {
    for (output, what) in
        [("train.txt", "not a folder"), ("work", "neither empty nor a checkpoint"), (".", "neither empty nor a checkpoint")]
    {
        let dir = folder(|r| r.replace("output = \"out\"", &format!("output = \"{output}\"")));
        let refused = Trainer::new(config(dir.path()), false).unwrap_err().to_string();
        assert!(refused.contains(what), "{output}: {refused}");
    }
    let dir = folder(|r| r);
    drop(Trainer::new(config(dir.path()), false).unwrap());
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("partial")), "{left:?}");
}

/// However short the held-out text: only the evaluation at the end is that of the end.
#[test]
fn evaluations_of_the_run_stay_in_its_log() {
    let dir = folder(|r| r.replace("eval_tokens = 64", "eval_tokens = 1000000"));
    let evaluations = || {
        let records = log::read(&log_path(&config(dir.path()))).unwrap();
        let of = |record| if let Record::Evaluation(e) = record { Some((e.step, e.complete)) } else { None };
        records.into_iter().filter_map(of).collect::<Vec<_>>()
    };
    train(dir.path(), false);
    assert_eq!(evaluations(), [(5, false), (10, false), (12, true)]);
    train(dir.path(), true);
    assert_eq!(evaluations(), [(5, false), (10, false), (12, true)], "after a second end");
}

#[test]
fn a_constant_temperature_is_saved_as_such() {
    let dir = folder(|r| r.replace("schedule = \"exp\", init = 2.0, final = 0.5", "schedule = \"constant\", init = 1.0, final = 1.0"));
    let trained = train(dir.path(), false);
    export(&config(dir.path()), &trained).unwrap();
    let checkpoint = crate::checkpoint::Checkpoint::open(&config(dir.path()).output).unwrap();
    let temperature = checkpoint.routing().unwrap().train.as_ref().unwrap().temperature.clone().unwrap();
    assert_eq!((temperature.init, temperature.end, temperature.at_save), (Some(1.0), Some(1.0), Some(1.0)));
}

#[test]
fn what_is_saved_is_what_was_evaluated() {
    let dir = folder(|r| r);
    let trained = train(dir.path(), false);
    let config = config(dir.path());
    export(&config, &trained).unwrap();
    assert!(fs::read_to_string(config.work.join("curves.svg")).unwrap().contains("held-out perplexity"));

    let loaded = load(&config.output, DeviceKind::Cpu, WeightType::Auto, false).unwrap();
    let spec = loaded.decoder.spec();
    assert_eq!((spec.reference, spec.estimator.as_str()), (ReferenceRouting::Soft { temperature: 1.0 }, "gumbel_soft"));
    let block = loaded.checkpoint.routing().unwrap().train.as_ref().unwrap().temperature.clone().unwrap();
    assert_eq!((block.at_save, block.folded), (Some(0.5), Some(true)));

    let tokens = heldout(&config, &loaded.checkpoint.tokenizer().unwrap());
    for (routing, wanted) in [
        (RoutingChoice::Native, trained.evaluation.top1_perplexity),
        (RoutingChoice::TopK { k: 2, weight_form: None }, trained.evaluation.top2_perplexity),
        (RoutingChoice::Soft { temperature: None }, trained.evaluation.reference_perplexity),
    ] {
        let found = evaluate(&loaded.decoder, &tokens, config.model.context, routing).unwrap().perplexity;
        assert_eq!(found, wanted, "{routing}");
    }
}

#[test]
fn folding_divides_the_router_and_nothing_else() {
    let trained = train(folder(|r| r).path(), false);
    let (plain, folded) = (trained.model.detached(), folded(&trained.model, 0.5).unwrap());
    let router = |w: &crate::model::weights::ModelWeights| match &w.layers[0].feed_forward {
        FeedForwardWeights::Moe(moe) => moe.router.to_vec2::<f32>().unwrap(),
        FeedForwardWeights::Dense(_) => panic!("every layer is routed"),
    };
    assert_eq!(router(&folded)[1][2], router(&plain)[1][2] * 2.0);
    assert_eq!(folded.embedding.to_vec2::<f32>().unwrap(), plain.embedding.to_vec2::<f32>().unwrap());
}

#[test]
fn a_state_is_not_overwritten_nor_continued_under_another_recipe() {
    let dir = folder(|r| r.replace("steps = 12", "steps = 4"));
    train(dir.path(), false);
    let refused = Trainer::new(config(dir.path()), false).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert!(refused.to_string().contains("--resume"), "{refused}");
    fs::write(dir.path().join("train.toml"), RECIPE.replace("hidden_size = 16", "hidden_size = 32")).unwrap();
    assert!(Trainer::new(config(dir.path()), true).unwrap_err().to_string().contains("another recipe"));
    let moved = folder(|r| r.replace("steps = 12", "steps = 4"));
    train(moved.path(), false);
    let text = fs::read_to_string(moved.path().join("train.txt")).unwrap();
    fs::write(moved.path().join("train.txt"), text.replace("cat", "dog")).unwrap();
    assert!(Trainer::new(config(moved.path()), true).unwrap_err().to_string().contains("another text"));
}

#[test]
fn bad_recipes_name_the_field() {
    for (from, to, field) in [
        ("steps = 12", "steps = 0", "run.steps"),
        ("batch = 4", "batch = 0", "run.batch: must be above 0"),
        ("eval_every = 5", "eval_every = 0", "run.eval_every: must be above 0"),
        ("save_every = 4", "save_every = 0", "run.save_every: must be above 0"),
        ("save_every = 4", "save_every = 4\nskip_limit = 0", "run.skip_limit: must be above 0"),
        ("hidden_size = 16", "hidden_size = 0", "model.hidden_size: must be above 0"),
        ("layers = 2", "layers = 0", "model.layers: must be above 0"),
        ("expert_width = 8", "expert_width = 0", "model.expert_width: must be above 0"),
        ("beta1 = 0.9", "beta1 = 1.0", "optimizer.beta1: must be at least 0 and below 1"),
        ("beta2 = 0.95", "beta2 = 1.0", "optimizer.beta2: must be at least 0 and below 1"),
        ("warmup_steps = 2", "warmup_steps = 12", "optimizer.warmup_steps: must be below run.steps"),
        ("kv_heads = 1", "kv_heads = 3", "model.kv_heads"),
        ("final = 0.5", "final = 0.0", "routing.temperature"),
        ("estimator = \"gumbel_soft\"", "estimator = \"soft\"", "routing.noise: soft has no such parameter"),
        ("estimator = \"gumbel_soft\"", "estimator = \"gumbel_sof\"", "did you mean gumbel_soft?"),
        ("serve_k = 1", "serve_k = 1\nk = 2", "routing.k: gumbel_soft has none"),
        ("switch = 0.01", "switch = -0.01", "routing.losses.switch: must not be negative"),
        ("switch = 0.01", "swich = 0.01", "routing.losses.swich: is unknown"),
        ("switch = 0.01", "load = 0.01", "routing.losses.load"),
        ("serve_k = 1", "serve_k = 1\nbias_rate = 0.001", "routing.bias_rate: needs an estimator that chooses"),
        ("serve_k = 1", "serve_k = 1\ncapacity = { factor = 1.25 }", "routing.capacity: needs an estimator that chooses"),
        ("serve_k = 1", "serve_k = 1\nremedies = [\"reset\"]", "routing.remedies: 'reset' is unknown"),
        ("serve_k = 1", "serve_k = 1\nremedies = [\"bias_bump\"]", "routing.remedies: 'bias_bump' needs an estimator that chooses"),
        ("serve_k = 1", "serve_k = 1\ntrain = \"experts\"\nremedies = [\"reinit\"]", "routing.remedies: 'reinit' needs"),
        ("serve_k = 1", "serve_k = 1\nexplore = { jitter = 1.5 }", "routing.explore.jitter: must be at least 0 and below 1"),
        ("serve_k = 1", "serve_k = 1\nexplore = { epsilon = 0.1 }", "routing.explore.epsilon: needs an estimator that chooses"),
        ("serve_k = 1", "serve_k = 1\nrouter_rate = 0.0", "routing.router_rate: must be above 0"),
        ("serve_k = 1", "serve_k = 1\ntrain = \"router\"\ntrian = 3", "routing.trian: gumbel_soft has no such parameter"),
        ("final = 0.5 }", "final = 0.5, until = 5000 }", "`until` = 5000 is past the end of the run, 12 steps"),
        ("serve_k = 1", "serve_k = 3", "routing.serve_k"),
        ("vocab_size = 300", "vocab_size = 30", "data.vocab_size"),
        ("final = 0.5", "final = 1e-60", "routing.temperature"),
        ("final = 0.5", "final = 2e-38", "routing.temperature: init and final must be at least 1e-30"),
        ("final = 0.5", "final = 1e300", "routing.temperature: init and final must be at most 1e30"),
        ("\"exp\", init = 2.0", "\"constant\", init = 2.0", "routing.temperature: a constant schedule stays at init = 2"),
        ("serve_k = 1", "serve_k = 1\nrouter_rate = 1e308", "routing.router_rate: must be above 0 and at most 1e30"),
        ("layers = 2", "layers = 1000000000", "model.layers"),
        ("experts = 3", "experts = 1000000000", "model.experts"),
        ("expert_width = 8", "expert_width = 9000000000000000000", "model: must have at most"),
        ("hidden_size = 16", "hidden_size = 9000000000000000000", "model: must have at most"),
        ("heads = 2", "heads = 9223372036854775807", "model.heads"),
        ("batch = 4", "batch = 9000000000000000000", "run.batch"),
        ("eval_tokens = 64", "eval_tokens = 1", "run.eval_tokens"),
        ("clip_norm = 1.0", "clip_norm = 1.0\nnesterov = true", "nesterov"),
        ("estimator = \"gumbel_soft\"", "estimator = \"onehot\"", "routing.estimator: onehot is only for the laboratory"),
        ("switch = 0.01", "sequence = 0.01", "routing.losses.sequence: counts the chosen experts, and gumbel_soft chooses all"),
    ] {
        let dir = folder(|recipe| recipe.replace(from, to));
        let error = TrainConfig::read(&dir.path().join("train.toml")).unwrap_err();
        assert!(error.to_string().contains(field), "{to}: {error}");
    }
    for (lines, message) in [
        ("estimator = \"reinmax\"\nserve_k = 1\nremedies = [\"bias_bump\"]", "routing.remedies: reinmax draws its experts"),
        ("estimator = \"gumbel_st\"\nserve_k = 1\nbias_rate = 0.01", "routing.bias_rate: gumbel_st draws its experts"),
        ("estimator = \"reinforce\"\nserve_k = 1\nexplore = { epsilon = 0.1 }", "routing.explore.epsilon: reinforce draws its experts"),
        (
            "estimator = \"reinforce\"\nserve_k = 1\nbaseline = \"self_critical\"\nsamples = 60000",
            "run.batch: must be at most 16777216 tokens per step with its 60001 copies",
        ),
    ] {
        let batch = if message.starts_with("run.batch") { "batch = 32" } else { "batch = 4" };
        let dir = folder(|recipe| routed(lines)(recipe).replace("batch = 4", batch));
        let error = TrainConfig::read(&dir.path().join("train.toml")).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let balanced = "estimator = \"ste\"\nserve_k = 1\nlosses = { switch = 0.1 }\n";
    let frozen = "estimator = \"ste\"\nserve_k = 1\ntrain = \"experts\"\n";
    for (lines, message) in [
        ("estimator = \"noisy_topk\"\nserve_k = 1\nweights = \"renorm\"".to_owned(), "routing.weights: renormalised top-1"),
        ("estimator = \"renorm_topk\"\nserve_k = 1\nk = 1".to_owned(), "routing.k: renormalised top-1"),
        ("estimator = \"reinforce\"\nserve_k = 1\ndecay = 0.9".to_owned(), "routing.decay: has no effect because only baseline"),
        (
            format!("{balanced}remedies = [\"raise_balance\"]"),
            "routing.remedies: 'raise_balance' has no effect because it raises up to 0.1",
        ),
        ("estimator = \"ste\"\nserve_k = 1\nbias_rate = 1e308".to_owned(), "routing.bias_rate: must be at least 0 and at most 1e30"),
        (format!("{frozen}bias_rate = 0.1"), "routing.bias_rate: has no effect on what is served because train"),
        (format!("{frozen}remedies = [\"bias_bump\"]"), "routing.remedies: 'bias_bump' has no effect on what is served because train"),
        (format!("{frozen}router_rate = 0.3"), "routing.router_rate: has no effect because train"),
        (format!("{frozen}losses = {{ router_kl = 0.1 }}"), "routing.losses.router_kl: needs a teacher, and `hardmax train` has none"),
    ] {
        let dir = folder(routed(&lines));
        let error = TrainConfig::read(&dir.path().join("train.toml")).unwrap_err().to_string();
        assert!(error.starts_with(message), "{lines}: {error}");
    }
    let empty = folder(|r| r.replace("heldout.txt", "nothing.txt"));
    fs::write(empty.path().join("nothing.txt"), "\n\n").unwrap();
    let error = Trainer::new(config(empty.path()), false).unwrap_err().to_string();
    assert_eq!(error, "data.heldout: the files hold no text");
    let missing = folder(|r| r.replace("train.txt", "absent.txt"));
    assert!(Trainer::new(config(missing.path()), false).unwrap_err().to_string().contains("absent.txt"));
}

#[test]
fn the_recipe_of_the_shipped_model_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/train.toml");
    let plan = TrainConfig::read(&path).unwrap().plan().unwrap();
    let (first, last) = (plan.estimator(0), plan.estimator(plan.steps));
    assert_eq!((first.noise.scale, last.noise.scale), (1.0, 0.0));
    assert_eq!(plan.folding(plan.steps), 0.25);
    assert_eq!(plan.losses.len(), 2);
}
