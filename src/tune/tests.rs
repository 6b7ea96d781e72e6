//! Whole runs on a tiny model, and what is refused before one.

use std::{cell::Cell, collections::BTreeMap, fs, path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};

use super::{
    candidate::Candidate,
    config::{Distill, EarlyStop, Recompute, TuneConfig},
    data::{Corpus, DataShape},
    select::Target,
    store::Store,
    tuner::{AtOnce, Base, Ended, Event, Flow, Pace, Phase, Tuner},
};
use crate::{
    checkpoint::Delta,
    error::{Error, ErrorKind, Result},
    model::{
        FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec,
        load::{ServingModel, ServingOptions, WeightType},
        weights::ModelWeights,
    },
    moe::{estimator::Param, policy::WeightForm},
    ops::as_on_a_device,
    schedule::{Schedule, Shape},
    train::trainable::Trainable,
};

fn spec(temperature: f32) -> ModelSpec {
    let moe = MoeSpec { num_experts: 3, expert_width: 8, top_k: 1, weight_form: WeightForm::Renorm, shared_expert_width: None };
    ModelSpec {
        family: "mixtral".into(),
        vocab_size: 40,
        hidden_size: 16,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        qkv_bias: false,
        out_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        rms_norm_eps: 1e-5,
        rope: RopeSpec { theta: 1e4, scaling: RopeScaling::None },
        max_context: 16,
        tied_head: true,
        layers: vec![LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) }; 2],
        reference: ReferenceRouting::Soft { temperature },
        estimator: "soft".into(),
    }
}

/// Random, with routers that tell tokens apart.
fn weights(spec: &ModelSpec) -> ModelWeights {
    let model = Trainable::init(spec, |experts| experts, &mut StdRng::seed_from_u64(1), &Device::Cpu).unwrap();
    model.detached().map_named(&mut |name, tensor| match name {
        _ if name.ends_with(".router") => (tensor * 20.0).unwrap(),
        "embedding" => (tensor * 20.0).unwrap(),
        _ => tensor.copy().unwrap(),
    })
}

fn base_of(temperature: f32, dtype: DType) -> Base {
    let spec = Arc::new(spec(temperature));
    let large = |name: &str| !name.contains("norm") && !name.ends_with(".router");
    let weights = weights(&spec).map_named(&mut |name, tensor| if large(name) { tensor.to_dtype(dtype).unwrap() } else { tensor.clone() });
    Base { model: ServingModel::new(spec, weights, ServingOptions::default()).unwrap(), routing: None }
}

fn corpus() -> Corpus {
    let tokens = (0..2000u32).map(|i| (i * i / 3 + 7 * i) % 40).collect();
    Corpus::split(tokens, DataShape { window: 16, heldout_share: 0.2, end: None, vocab: 40, most_tokens: 2000 }).unwrap()
}

fn config(edit: impl FnOnce(&mut TuneConfig)) -> TuneConfig {
    let mut config = TuneConfig::default();
    (config.run.steps, config.run.windows, config.run.micro_windows) = (12, 4, 2);
    (config.run.eval_every, config.run.eval_tokens) = (5, 40);
    config.optimizer.learning_rate = 1e-2;
    edit(&mut config);
    config
}

fn annealed(config: &mut TuneConfig) {
    config.routing.params.insert("temperature".into(), Param::Schedule(Schedule::new(Shape::Exp, 1.0, 0.1)));
}

fn run(base: &Base, config: TuneConfig) -> Result<(Candidate, Vec<Event>)> {
    let mut events = Vec::new();
    let candidate = done(Tuner::new(base.clone(), corpus(), config, None)?.run(&mut AtOnce, &mut |event| events.push(event))?);
    Ok((candidate, events))
}

fn done(ended: Ended) -> Candidate {
    let Ended::Done(candidate) = ended else { panic!("{ended:?}") };
    *candidate
}

/// There are no more turns once it is set.
struct Until<'a>(&'a Cell<bool>);

impl Pace for Until<'_> {
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.0.get() { Err(Error::Draining) } else { work() }
    }

    fn flow(&mut self) -> Flow {
        Flow::Go
    }
}

/// Says something else than `Go` from the time on at which it was asked so often.
struct After {
    asked: usize,
    flow: Flow,
}

impl Pace for After {
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        work()
    }

    fn flow(&mut self) -> Flow {
        self.asked = self.asked.saturating_sub(1);
        if self.asked == 0 { self.flow } else { Flow::Go }
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_run_leaves_what_it_measured() {
    let base = base_of(1.0, DType::F32);
    let (candidate, events) = run(&base, config(annealed)).unwrap();
    assert_eq!(candidate.tensors.keys().collect::<Vec<_>>(), ["layers.0.router", "layers.1.router"]);
    let own: BTreeMap<String, Tensor> = base.model.weights().unwrap().named().into_iter().map(|(n, t)| (n, t.clone())).collect();
    assert!(candidate.tensors.iter().all(|(name, tensor)| values(tensor) != values(&own[name])));
    let all = |base: &Base| base.model.weights().unwrap().named().iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>();
    assert_eq!(all(&base), all(&base_of(1.0, DType::F32)), "the model that is served stays");
    let (before, after) = (&candidate.before.routings, &candidate.after.routings);
    assert_eq!(before.iter().map(|r| r.routing.as_str()).collect::<Vec<_>>(), ["native", "top-2"], "top-1 is the native one");
    assert_eq!(before[0].kl, before[0].teacher_kl, "before, both gaps are one");
    assert!(after[0].kl < 0.5 * before[0].kl, "sharper routers: {} and {}", after[0].kl, before[0].kl);
    assert_ne!(after[0].kl, after[0].teacher_kl);
    assert_eq!((candidate.before.tokens, before[0].utilization.len(), candidate.verdicts.len()), (corpus().heldout.len() as u64, 2, 4));
    let steps = events.iter().filter(|event| matches!(event, Event::Step(_))).count();
    let evaluations: Vec<usize> =
        events.iter().filter_map(|e| if let Event::Evaluation { step, .. } = e { Some(*step) } else { None }).collect();
    assert_eq!((steps, evaluations, candidate.reason), (12, vec![5, 10], "steps"));
    let train = candidate.routing.train.as_ref().unwrap();
    assert_eq!((train.estimator.as_str(), train.steps, train.frozen_router), ("soft", Some(12), Some(false)));
    assert_eq!(train.temperature.as_ref().unwrap().folded, Some(true));
    assert_eq!(candidate.routing.fidelity.as_ref().unwrap().kl, Some(after[0].kl));
}

/// Whatever the target, and with recomputation too: what does not learn is the same memory with the same bytes, and no part of the result.
#[test]
fn what_is_no_target_stays_as_it_is() {
    for dtype in [DType::F32, DType::BF16] {
        for (target, recompute) in
            [("router", Recompute::None), ("router+experts", Recompute::Layer), ("all", Recompute::Layer), ("layers.1", Recompute::None)]
        {
            let base = base_of(1.0, dtype);
            let weights = Arc::clone(base.model.weights().unwrap());
            let before: Vec<(String, Vec<f32>)> = weights.named().into_iter().map(|(name, tensor)| (name, values(tensor))).collect();
            let target = Target::from(target.to_owned());
            let told = |config: &mut TuneConfig| {
                (config.target, config.run.recompute, config.run.steps) = (target.clone(), recompute, 2);
            };
            let (candidate, _) = run(&base, config(told)).unwrap();
            let chosen = target.select(base.model.spec(), &weights).unwrap().names;
            assert!(candidate.tensors.keys().eq(chosen.iter()), "{target}");
            let tuned = base.model.with_tensors(&candidate.tensors).unwrap();
            let tuned = tuned.weights().unwrap().named();
            for (((name, old), (_, new)), (_, bytes)) in weights.named().into_iter().zip(tuned).zip(before) {
                let same = std::ptr::eq(&*old.storage_and_layout().0, &*new.storage_and_layout().0);
                assert_eq!(same, !chosen.contains(&name), "{target}: {name}");
                assert_eq!(values(old), bytes, "{target}: {name}: the model that is served stays");
            }
        }
    }
}

/// Gradients that are no numbers move nothing; they are counted, and too many in a row end the run.
#[test]
fn steps_without_finite_gradients_are_skipped() {
    let base = base_of(1.0, DType::F32);
    let named = |weights: &ModelWeights| weights.named().into_iter().map(|(name, t)| (name, t.clone())).collect::<BTreeMap<_, _>>();
    let mut final_norm = named(base.model.weights().unwrap())["final_norm"].to_vec1::<f32>().unwrap();
    final_norm[0] = f32::NAN;
    let broken = BTreeMap::from([("final_norm".to_owned(), Tensor::new(final_norm, &Device::Cpu).unwrap())]);
    let base = Base { model: base.model.with_tensors(&broken).unwrap(), routing: None };
    let mut steps = Vec::new();
    let tuner = Tuner::new(base, corpus(), config(|config| config.run.skip_limit = 3), None).unwrap();
    let error = tuner.run(&mut AtOnce, &mut |event| steps.extend(if let Event::Step(step) = event { Some(step) } else { None }));
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("run.skip_limit"), "{error}");
    assert_eq!(steps.iter().map(|step| (step.skipped, step.grad_norm)).collect::<Vec<_>>(), [(1, None), (2, None), (3, None)]);
    // What JSON cannot say is read as the worst there is.
    let told = serde_json::to_string(&Event::Step(steps[0].clone())).unwrap();
    let Event::Step(read) = serde_json::from_str(&told).unwrap() else { panic!("{told}") };
    assert_eq!((read.loss, read.skipped), (f64::INFINITY, 1));
}

#[test]
fn a_run_that_does_not_fit_is_refused() {
    let told = |most: Option<u64>| config(|config| config.run.max_memory_bytes = most);
    let new = |config: TuneConfig| Tuner::new(base_of(1.0, DType::F32), corpus(), config, None);
    let needed = new(told(None)).unwrap().memory().total;
    assert!(new(told(Some(needed))).is_ok());
    let refused = new(told(Some(needed - 1))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    let (needed, allowed) = (needed.div_ceil(1 << 20), (needed - 1) >> 20);
    let message = format!("the run needs at most {needed} MiB beside the model, and {allowed} MiB are allowed: choose fewer micro windows");
    assert!(refused.to_string().starts_with(&message), "{refused}");
    let of = |edit: fn(&mut TuneConfig)| *new(config(edit)).unwrap().memory();
    let (plain, small, again) =
        (of(|_| ()), of(|c| c.run.micro_windows = 1), of(|c| (c.run.recompute, c.target) = (Recompute::Layer, Target::All)));
    assert!(small.activations * 2 == plain.activations && small.variables == plain.variables, "{small:?} {plain:?}");
    let all = of(|c| c.target = Target::All);
    assert!(again.activations < all.activations && again.variables == all.variables && all.moments == 2 * all.variables);
    assert_eq!(of(|c| c.stop = Some(EarlyStop::default())).candidate, 2 * plain.candidate);
}

/// Also between processes: nothing that is summed comes out of a hash map.
#[test]
fn one_seed_is_one_candidate() {
    let base = base_of(1.0, DType::F32);
    let dir = tempfile::tempdir().unwrap();
    let file = |seed: u64, name: &str| {
        let (candidate, _) = run(
            &base,
            config(|config| {
                annealed(config);
                config.run.seed = seed;
                config.distill = Some(Distill::default());
                config.target = Target::RouterAndExperts;
            }),
        )
        .unwrap();
        let path = dir.path().join(name);
        candidate.delta("0".repeat(64)).write(&path).unwrap();
        fs::read(path).unwrap()
    };
    assert!(file(1, "a") == file(1, "b"));
    assert!(file(1, "c") != file(2, "d"));
    let read = Delta::read(&dir.path().join("a")).unwrap();
    assert_eq!((read.base, read.tensors.len()), ("0".repeat(64), 6));
}

/// The mixture at the reference's temperature is the one that the estimator begins with, and a candidate is read the same way.
#[test]
fn routers_are_scaled_from_and_to_the_reference() {
    let base = base_of(2.0, DType::F32);
    let still = |config: &mut TuneConfig| {
        config.optimizer.learning_rate = 1e-12;
        config.routing.params.insert("temperature".into(), Param::Number(1.0));
        config.run.steps = 2;
    };
    let (candidate, events) = run(&base, config(still)).unwrap();
    let own: BTreeMap<String, &Tensor> = base.model.weights().unwrap().named().into_iter().collect();
    for (name, tensor) in &candidate.tensors {
        let apart = values(tensor).iter().zip(values(own[name])).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    assert!((candidate.after.reference_perplexity / candidate.before.reference_perplexity - 1.0).abs() < 1e-4);
    // A student that has not moved is its teacher.
    let (_, distilled) = run(
        &base,
        config(|config| {
            still(config);
            config.distill = Some(Distill { weight: 1.0, lm_weight: 0.0 });
        }),
    )
    .unwrap();
    let norm = |events: &[Event]| events.iter().find_map(|e| if let Event::Step(step) = e { step.grad_norm } else { None }).unwrap();
    assert!(norm(&distilled) < 1e-3 * norm(&events), "{} and {}", norm(&distilled), norm(&events));
    assert_eq!(candidate.routing.reference.as_ref().unwrap().temperature, Some(2.0));
    assert_eq!(candidate.routing.train.unwrap().temperature.unwrap().folded, Some(false), "the reference is not at 1");
}

#[test]
fn weights_of_bf16_stay_bf16() {
    let base = base_of(1.0, DType::BF16);
    let (candidate, _) = run(&base, config(|config| config.target = Target::All)).unwrap();
    let own: BTreeMap<String, &Tensor> = base.model.weights().unwrap().named().into_iter().collect();
    assert_eq!(candidate.tensors.len(), own.len());
    assert!(candidate.tensors.iter().all(|(name, tensor)| tensor.dtype() == own[name].dtype()));
    assert!(candidate.after.reference_perplexity < candidate.before.reference_perplexity, "it learned the text");
}

/// Counts what goes through it; once it is told to, there are no more turns, but for what is to be dropped.
#[derive(Default)]
struct Counted {
    turns: usize,
    released: usize,
    most: Option<usize>,
}

impl Pace for Counted {
    fn turn(&mut self, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.most.is_some_and(|most| self.turns >= most) {
            return Err(Error::Draining);
        }
        self.turns += 1;
        work()
    }

    fn release(&mut self, drop: &mut dyn FnMut()) {
        self.released += 1;
        drop();
    }

    fn flow(&mut self) -> Flow {
        Flow::Go
    }
}

/// A whole run in the operations of a device, over bf16 weights with f32 masters: it learns, what it leaves is on the host in the types of
/// what it replaces, and what it held is dropped in turns, also where it is cut.
#[test]
fn a_run_on_a_device_learns_and_leaves_nothing_outside_of_turns() {
    let told = |config: &mut TuneConfig| {
        (config.target, config.distill) = (Target::All, Some(Distill { weight: 0.1, lm_weight: 1.0 }));
        config.run.steps = 6;
    };
    as_on_a_device(|| {
        for recompute in [Recompute::None, Recompute::Layer] {
            let base = base_of(1.0, DType::BF16);
            assert!(base.model.on_device());
            let config = config(|config| {
                told(config);
                config.run.recompute = recompute;
            });
            let tuner = || Tuner::new(base.clone(), corpus(), config.clone(), None).unwrap();
            let mut pace = Counted::default();
            let candidate = done(tuner().run(&mut pace, &mut |_| ()).unwrap());
            let own: BTreeMap<String, &Tensor> = base.model.weights().unwrap().named().into_iter().collect();
            assert!(candidate.tensors.iter().all(|(name, tensor)| tensor.dtype() == own[name].dtype()));
            assert!(candidate.after.reference_perplexity < candidate.before.reference_perplexity, "{recompute:?}: it learned the text");
            // Two teachers a step; models and caches of two evaluations and of one on the way, without a model before; all of the run.
            assert_eq!(pace.released, 2 * 6 + (1 + 2 + 2) + 1, "{recompute:?}");
            for most in [0, 3, pace.turns / 2, pace.turns - 1] {
                let mut cut = Counted { most: Some(most), ..Counted::default() };
                assert!(matches!(tuner().run(&mut cut, &mut |_| ()).unwrap(), Ended::Left), "{most}");
                assert!(cut.released >= 1, "{most}");
            }
        }
    });
    let (here, _) = run(&base_of(1.0, DType::BF16), config(told)).unwrap();
    let there = as_on_a_device(|| run(&base_of(1.0, DType::BF16), config(told)).unwrap().0);
    let (a, b) = (here.after.reference_perplexity, there.after.reference_perplexity);
    assert!((a - b).abs() < 0.05 * a, "{a} on the CPU, {b} in the operations of a device");
}

#[test]
fn time_ends_a_run() {
    let (candidate, _) = run(&base_of(1.0, DType::F32), config(|config| config.run.max_seconds = Some(1e-9))).unwrap();
    assert_eq!((candidate.reason, candidate.steps), ("time", 1));
}

#[test]
fn what_cannot_be_is_refused_by_name_before_anything_is_done() {
    type Edit = fn(&mut TuneConfig);
    let cases: [(Edit, &str); 20] = [
        (|c| c.routing.estimator = "sof".into(), "routing.estimator: 'sof' is unknown; did you mean soft?"),
        (|c| c.routing.estimator = "noisy_topk".into(), "routing.estimator: noisy_topk needs 6 router outputs for 3 experts"),
        (|c| c.routing.estimator = "onehot".into(), "routing.estimator: onehot is only for the laboratory"),
        (
            |c| _ = c.routing.losses.insert("router_kl".into(), Schedule::constant(0.1)),
            "routing.losses.router_kl: keeps routers near those of a teacher",
        ),
        (|c| _ = c.routing.params.insert("alpha".into(), Param::Number(1.0)), "routing.alpha: soft has no such parameter"),
        (|c| c.target = Target::Named(vec!["layers.9".into()]), "target: 'layers.9' is none of router, router+experts, all"),
        (|c| c.run.window_tokens = Some(17), "run.window_tokens: must be from 2 to 16"),
        (|c| c.target = Target::Named(vec!["layers.0".into(), "layers.0".into()]), "target: 'layers.0' is there twice"),
        (|c| c.run.micro_windows = 3, "run.micro_windows: must divide run.windows, 4"),
        (|c| (c.run.windows, c.run.micro_windows) = (u32::MAX as usize, 1), "run.windows: make 68719476720 tokens a step"),
        (|c| c.run.steps = 0, "run.steps: must be above 0"),
        (|c| c.run.heldout_share = 0.0, "run.heldout_share: must be above 0 and at most 0.5"),
        (|c| c.run.serving = Some("top-9".into()), "run.serving: top-9: "),
        (|c| c.run.reference = Some("sotf".into()), "run.reference: sotf: "),
        (|c| c.optimizer.learning_rate = 0.0, "optimizer.learning_rate: must be above 0"),
        (|c| c.optimizer.router_rate = 0.0, "optimizer.router_rate: must be above 0"),
        (|c| c.optimizer.warmup_steps = Some(12), "optimizer.warmup_steps: must be below run.steps"),
        (|c| c.optimizer.clip_norm = f64::INFINITY, "optimizer.clip_norm: must be above 0"),
        (|c| c.distill = Some(Distill { weight: 0.0, lm_weight: 1.0 }), "distill.weight: must be above 0"),
        (
            |c| (c.routing.estimator, c.distill) = ("reinforce".into(), Some(Distill::default())),
            "distill.weight: reinforce learns from the losses of its draws",
        ),
    ];
    let base = base_of(1.0, DType::F32);
    for (edit, message) in cases {
        let error = Tuner::new(base.clone(), corpus(), config(edit), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().starts_with(message), "{error}");
    }
    let mut foreign = corpus();
    foreign.heldout[3] = 40;
    let error = Tuner::new(base.clone(), foreign, config(|_| ()), None).unwrap_err().to_string();
    assert_eq!(error, "data: token 40 is not below 40, the size of the vocabulary");
    let (spec, options) = (Arc::clone(base.model.spec()), ServingOptions { weights: WeightType::Q8, ..ServingOptions::default() });
    let small = ServingModel::new(Arc::clone(&spec), weights(&spec), options).unwrap();
    let error = Tuner::new(Base { model: small, routing: None }, corpus(), config(|_| ()), None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("--dtype f32 or bf16"), "{error}");
}

#[test]
fn targets_have_names() {
    let (spec, weights) = (spec(1.0), weights(&spec(1.0)));
    let select = |text: &str| Target::from(text.to_owned()).select(&spec, &weights).unwrap();
    assert_eq!(select("router").names.len(), 2);
    assert_eq!(select("router+experts").names.len(), 6);
    assert_eq!(select("all").names.len(), weights.named().len());
    let one = select("layers.1, final_norm");
    assert!(
        one.names.contains("layers.1.query") && one.names.contains("final_norm") && !one.names.iter().any(|n| n.starts_with("layers.0"))
    );
    assert_eq!((one.frozen_routers, select("router").frozen_routers), (vec![0], Vec::new()));
    for text in ["router", "router+experts", "all", "layers.1,head"] {
        assert_eq!(Target::from(text.to_owned()).to_string(), text);
    }
}

/// What is on disk of a candidate.
fn bytes(candidate: &Candidate, dir: &Path) -> Vec<u8> {
    let path = dir.join("candidate");
    candidate.delta("0".repeat(64)).write(&path).unwrap();
    fs::read(path).unwrap()
}

/// Of an interrupted run, with its newest state as it was, cut, changed, empty, or gone.
#[test]
fn a_run_goes_on_as_if_it_had_not_ended() {
    let base = base_of(1.0, DType::F32);
    let told = || {
        config(|config| {
            annealed(config);
            config.routing.losses.insert("switch".into(), Schedule::constant(0.01));
            config.target = Target::RouterAndExperts;
            config.run.save_every = 3;
        })
    };
    let dir = tempfile::tempdir().unwrap();
    let wanted = bytes(&run(&base, told()).unwrap().0, dir.path());
    type Damage = fn(&Path);
    let damages: [(Damage, usize); 5] = [
        (|_| (), 6),
        (|file| fs::write(file, &fs::read(file).unwrap()[..1000]).unwrap(), 3),
        (
            |file| {
                let mut bytes = fs::read(file).unwrap();
                let last = bytes.len() - 9;
                bytes[last] ^= 1;
                fs::write(file, bytes).unwrap();
            },
            3,
        ),
        (|file| fs::write(file, b"").unwrap(), 3),
        (|file| fs::rename(file, file.with_extension("77.partial")).unwrap(), 3),
    ];
    for (index, (damage, from)) in damages.into_iter().enumerate() {
        let work = dir.path().join(format!("work{index}"));
        let store = || Store::open(&work, "recipe".into()).unwrap();
        let cut = Tuner::new(base.clone(), corpus(), told(), Some(store())).unwrap();
        assert!(Store::open(&work, "recipe".into()).unwrap_err().to_string().contains("another run writes"), "one run at a time");
        let killed = Cell::new(false);
        let ended = cut.run(&mut Until(&killed), &mut |event| killed.set(matches!(event, Event::Step(step) if step.step == 8)));
        assert!(matches!(ended, Ok(Ended::Left)), "{ended:?}");
        let newest =
            fs::read_dir(&work).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some()).max().unwrap();
        damage(&newest);
        let tuner = Tuner::new(base.clone(), corpus(), told(), Some(store())).unwrap();
        assert_eq!(tuner.done(), from, "damage {index}");
        let candidate = done(tuner.run(&mut AtOnce, &mut |_| ()).unwrap());
        assert!(bytes(&candidate, dir.path()) == wanted, "damage {index}");
        let left: Vec<String> = fs::read_dir(&work).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(left.iter().filter(|name| name.starts_with("state-")).count(), 2, "{left:?}");
        assert!(!left.iter().any(|name| name.ends_with(".partial")), "{left:?}");
        let other = Store::open(&work, "another".into()).unwrap();
        let refused = Tuner::new(base.clone(), corpus(), told(), Some(other)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
        assert!(refused.to_string().contains("other settings, text or model"), "{refused}");
    }
}

/// Before the first step, between two, in an evaluation on the way, and in the last one: as often as it is asked.
#[test]
fn a_run_can_be_left_wherever_it_is_asked() {
    let base = base_of(1.0, DType::F32);
    let told = || {
        config(|config| {
            annealed(config);
            config.run.steps = 6;
            config.stop = Some(EarlyStop { patience: 2, min_change: 0.0 });
            config.run.eval_every = 2;
        })
    };
    let dir = tempfile::tempdir().unwrap();
    let (whole, events) = run(&base, told()).unwrap();
    let wanted = bytes(&whole, dir.path());
    let windows = |tokens: usize| tokens.div_ceil(16);
    let (all, some) = (windows(corpus().heldout.len()), windows(40));
    let asked = 2 * all + events.iter().filter(|event| matches!(event, Event::Evaluation { .. })).count() * some + 7;
    for (index, flow) in [Flow::Pause, Flow::Leave].into_iter().enumerate() {
        let mut at = 1;
        while at <= asked {
            let work = dir.path().join(format!("{index}-{at}"));
            let tuner = || Tuner::new(base.clone(), corpus(), told(), Some(Store::open(&work, "recipe".into()).unwrap())).unwrap();
            let ended = tuner().run(&mut After { asked: at, flow }, &mut |_| ()).unwrap();
            assert!(matches!((ended, flow), (Ended::Paused, Flow::Pause) | (Ended::Left, Flow::Leave)), "asked {at} times");
            let mut baselines = 0;
            let candidate =
                done(tuner().run(&mut AtOnce, &mut |event| baselines += usize::from(event == Event::Phase(Phase::Baseline))).unwrap());
            assert!(bytes(&candidate, dir.path()) == wanted, "asked {at} times");
            assert_eq!(baselines, usize::from(at <= all), "what was measured is not measured again");
            at += 5;
        }
    }
    let mut pace = After { asked: all + 4, flow: Flow::Finish };
    let asked = done(Tuner::new(base.clone(), corpus(), config(annealed), None).unwrap().run(&mut pace, &mut |_| ()).unwrap());
    assert_eq!((asked.reason, asked.steps), ("asked", 3));
}

#[test]
fn the_best_weights_are_the_result_of_a_run_that_gets_worse() {
    let base = base_of(1.0, DType::F32);
    let worse = |config: &mut TuneConfig| {
        annealed(config);
        config.run.steps = 40;
        config.run.eval_every = 2;
        config.optimizer.warmup_steps = Some(8);
        config.optimizer.learning_rate = 2.0;
        config.target = Target::All;
    };
    let stop = EarlyStop { patience: 3, min_change: 0.0 };
    let (candidate, events) = run(
        &base,
        config(|config| {
            worse(config);
            config.stop = Some(stop);
        }),
    )
    .unwrap();
    let best = |events: &[Event]| {
        let told = |event: &Event| {
            if let Event::Evaluation { step, figures } = event { Some((*step, figures.serving()?.perplexity)) } else { None }
        };
        let losses: Vec<(usize, f64)> = events.iter().filter_map(told).collect();
        (losses.iter().copied().reduce(|best, next| if next.1 < best.1 { next } else { best }).unwrap().0, losses.len())
    };
    let (step, evaluations) = best(&events);
    assert_eq!((candidate.reason, candidate.steps), ("patience", step));
    assert_eq!(evaluations, step / 2 + stop.patience);
    assert_eq!(candidate.routing.train.as_ref().unwrap().steps, Some(step));
    // Without an end before its time, the best of all evaluations, of which the last step has one.
    let (candidate, events) = run(
        &base,
        config(|config| {
            worse(config);
            config.run.steps = 11;
            config.stop = Some(EarlyStop { patience: 100, min_change: 0.0 });
        }),
    )
    .unwrap();
    assert_eq!((candidate.reason, candidate.steps, 6), ("steps", best(&events).0, best(&events).1));
}

#[test]
fn what_leaves_the_weights_alone_is_no_part_of_a_recipe() {
    let of = |edit: fn(&mut TuneConfig)| config(edit).essence();
    assert_eq!(of(|c| (c.run.eval_every, c.run.save_every, c.run.max_seconds) = (1, 2, Some(3.0))), of(|_| ()));
    assert_eq!(of(|c| c.gates.max_new_dead = 4), of(|_| ()));
    assert_ne!(of(|c| c.run.seed = 4), of(|_| ()));
    assert_ne!(of(|c| c.run.micro_windows = 1), of(|_| ()), "sums in another order");
    let stop = |c: &mut TuneConfig| c.stop = Some(EarlyStop::default());
    let often = |c: &mut TuneConfig| (c.stop, c.run.eval_every) = (Some(EarlyStop::default()), 1);
    assert_ne!(config(stop).essence(), config(often).essence(), "it decides which weights are the result");
}

#[test]
fn a_store_leaves_what_others_are_writing() {
    let dir = tempfile::tempdir().unwrap();
    let [job, state] = ["job.json.7.partial", "state-00000001-0123.safetensors.7.partial"].map(|name| dir.path().join(name));
    for path in [&job, &state] {
        fs::write(path, "half").unwrap();
    }
    Store::open(dir.path(), "recipe".into()).unwrap();
    assert!(job.exists() && !state.exists());
}
