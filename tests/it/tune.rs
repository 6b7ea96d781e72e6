//! `hardmax tune` as a process.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use candle_core::{DType, Device};
use hardmax::{
    checkpoint::{Checkpoint, Delta, LoadOptions, SaveRequest, save},
    memory::Watermark,
    model::{
        FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec,
        load::{ServingModel, ServingOptions},
    },
    moe::policy::WeightForm,
    train::trainable::Trainable,
    tune::{
        config::{Recompute, TuneConfig},
        data::{Corpus, DataShape},
        store::Store,
        tuner::{AtOnce, Base, Tuner},
    },
};
use rand::{SeedableRng as _, rngs::StdRng};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

/// A folder with a little text, and with a tiny model: what is tested is the process, not what it learns.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(demo().join("data/heldout.txt")).unwrap();
    fs::write(dir.path().join("text.txt"), &text[..2000]).unwrap();
    let demo = Checkpoint::open(&demo()).unwrap();
    let mut spec = demo.spec().clone();
    (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) = (16, 2, 1, 8);
    spec.layers.truncate(2);
    for layer in &mut spec.layers {
        let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward else { panic!("a dense layer") };
        (moe.num_experts, moe.expert_width) = (4, 8);
    }
    let weights = Trainable::init(&spec, |experts| experts, &mut StdRng::seed_from_u64(1), &Device::Cpu).unwrap().detached();
    let (tokenizer, generation) = (demo.tokenizer().unwrap(), demo.generation());
    let request =
        SaveRequest { spec: &spec, weights: &weights, routing: demo.routing(), tokenizer: Some(&tokenizer), generation, dtype: DType::F32 };
    save(&dir.path().join("tiny"), &request).unwrap();
    dir
}

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.current_dir(dir).arg("tune");
    if !arguments.contains(&"--model") {
        command.args(["--model", "tiny"]);
    }
    let steps: &[&str] = if arguments.contains(&"--steps") { &[] } else { &["--steps", "2"] };
    command.args(steps).args(["--windows", "2", "--micro-windows", "1", "--window-tokens", "16"]).args(arguments);
    command
}

fn tune(dir: &Path, arguments: &[&str]) -> Output {
    command(dir, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_run_leaves_a_checkpoint_and_a_delta_that_say_the_same() {
    let dir = folder();
    let results = ["--output", "out", "--delta", "routers.safetensors", "--json", "report.json", "--override"];
    let model = demo().to_str().unwrap().to_owned();
    let flags = ["--model", &model, "--data", "text.txt", "--separator", "\\n\\n", "--distill", "1", "--recompute", "layer"];
    let output = tune(dir.path(), &[&flags[..], &results[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for row in [
        "reference  before",
        "native     after",
        "top-2      after",
        "gate perplexity: ",
        "gate gap: ",
        "gate newly dead experts (native): ",
    ] {
        assert!(table.contains(row), "{row}: {table}");
    }
    let report: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["steps"], &report["reason"], &report["config"]["target"]), (&2.into(), &"steps".into(), &"router".into()));
    assert_eq!(report["progress"].as_array().unwrap().len(), 2);
    assert!(report["memory"]["planned"]["total"].as_u64() >= report["memory"]["growth"].as_u64(), "{}", report["memory"]);

    let (base, tuned) = (Checkpoint::open(&demo()).unwrap(), Checkpoint::open(&dir.path().join("out")).unwrap());
    let delta = Delta::read(&dir.path().join("routers.safetensors")).unwrap();
    base.check_delta(&delta).unwrap();
    assert!(tuned.check_delta(&delta).is_err(), "it is over the base");
    let load = |checkpoint: &Checkpoint| checkpoint.load(&LoadOptions { dtype: DType::F32, device: Device::Cpu, progress: false }).unwrap();
    let (applied, loaded) = (load(&base).with(&delta.tensors).unwrap(), load(&tuned));
    for ((name, a), (_, b)) in applied.named().into_iter().zip(loaded.named()) {
        let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values(a) == values(b), "{name}");
    }
    assert_eq!(delta.tensors.len(), 4);
    let train = |checkpoint: &Checkpoint| checkpoint.routing().unwrap().train.clone().unwrap();
    assert_eq!(train(&tuned).steps, Some(train(&base).steps.unwrap() + 2));
    assert_eq!(tuned.routing().unwrap().serve, base.routing().unwrap().serve);
    tuned.tokenizer().unwrap();
}

/// Killed before its first step, between two, while it measures, or anywhere, and begun again, a run leaves the file that an undisturbed
/// one leaves. `HARDMAX_KILLS` says how often it is killed.
#[test]
fn a_run_that_is_killed_goes_on_to_the_same_result() {
    let dir = folder();
    fs::write(dir.path().join("tune.toml"), "[run]\nsave_every = 1\neval_every = 2\n[stop]\npatience = 9\n").unwrap();
    let arguments = ["--data", "text.txt", "--recipe", "tune.toml", "--steps", "5", "--override", "--target", "router+experts"];
    let output = tune(dir.path(), &[&arguments[..], &["--delta", "whole", "--work", "undisturbed"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    let kills = std::env::var("HARDMAX_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3);
    for kill in 0..kills {
        // The first three at what it says, the others some time after it has begun.
        let said =
            ["values of 6 tensors learn", "step 2: native", "step 4: native"].get(kill).copied().unwrap_or("values of 6 tensors learn");
        let (work, states) = (format!("killed-{kill}"), format!("states-{kill}"));
        let again = [&arguments[..], &["--delta", &work, "--work", &states, "--resume"]].concat();
        let mut first = command(dir.path(), &again).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(first.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains(said)), "{said}");
        if kill > 2 {
            #[expect(clippy::disallowed_methods, reason = "to be killed at no event at all is the point")]
            std::thread::sleep(Duration::from_millis(kill as u64 * 97 % 400));
        }
        first.kill().unwrap();
        first.wait().unwrap();
        let output = tune(dir.path(), &again);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let resumed = text(&output.stderr).contains("goes on from step");
        assert!(kill == 0 || kill > 2 || resumed, "steps that were done are not done again: {}", text(&output.stderr));
        assert!(read(&work) == read("whole"), "kill {kill}");
    }
    let refused = tune(dir.path(), &[&arguments[..], &["--delta", "x", "--work", "undisturbed"]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("continue it with --resume"), "{}", text(&refused.stderr));
    let other = tune(dir.path(), &[&arguments[..], &["--delta", "x", "--work", "undisturbed", "--resume", "--seed", "7"]].concat());
    assert_eq!(other.status.code(), Some(1));
    assert!(text(&other.stderr).contains("other settings, text or model"), "{}", text(&other.stderr));
}

/// Names a case of [`CASES`] to [`one_run_in_this_process`].
const CASE: &str = "HARDMAX_TEST_MEMORY_CASE";

/// A run, and a model for it: one of many activations and few weights, or the other way round.
struct Case {
    target: &'static str,
    recompute: Recompute,
    hidden: usize,
    experts: usize,
    layers: usize,
    micro_windows: usize,
}

const CASES: [Case; 4] = [
    Case { target: "router", recompute: Recompute::None, hidden: 16, experts: 16, layers: 4, micro_windows: 8 },
    Case { target: "all", recompute: Recompute::Layer, hidden: 16, experts: 24, layers: 6, micro_windows: 8 },
    Case { target: "router+experts", recompute: Recompute::None, hidden: 128, experts: 24, layers: 2, micro_windows: 1 },
    Case { target: "all", recompute: Recompute::None, hidden: 128, experts: 24, layers: 2, micro_windows: 1 },
];

impl Case {
    fn spec(&self) -> ModelSpec {
        let moe =
            MoeSpec { num_experts: self.experts, expert_width: 64, top_k: 1, weight_form: WeightForm::Renorm, shared_expert_width: None };
        ModelSpec {
            family: "mixtral".into(),
            vocab_size: 64,
            hidden_size: self.hidden,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 8,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            rms_norm_eps: 1e-5,
            rope: RopeSpec { theta: 1e4, scaling: RopeScaling::None },
            max_context: 64,
            tied_head: true,
            layers: vec![LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) }; self.layers],
            reference: ReferenceRouting::Soft { temperature: 1.0 },
            estimator: "soft".into(),
        }
    }

    /// What was planned over what was taken.
    fn ratio(&self) -> f64 {
        let spec = Arc::new(self.spec());
        let weights = Trainable::init(&spec, |experts| experts, &mut StdRng::seed_from_u64(1), &Device::Cpu).unwrap().detached();
        let base = Base { model: ServingModel::new(spec, weights, ServingOptions::default()).unwrap(), routing: None };
        let shape = DataShape { window: 64, heldout_share: 0.1, end: None, vocab: 64, most_tokens: usize::MAX };
        let corpus = Corpus::new((0..1280u32).map(|i| i * i % 61).collect(), (0..8).collect(), shape).unwrap();
        let mut config = TuneConfig { target: self.target.to_owned().into(), ..TuneConfig::default() };
        (config.run.steps, config.run.recompute) = (1, self.recompute);
        (config.run.micro_windows, config.run.windows) = (self.micro_windows, 2 * self.micro_windows);
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "recipe".into()).unwrap();
        let before = Watermark::set();
        let tuner = Tuner::new(base, corpus, config, Some(store)).unwrap();
        let planned = *tuner.memory();
        tuner.run(&mut AtOnce, &mut |_| ()).unwrap();
        let growth = before.growth().unwrap();
        println!("{growth} bytes of {planned:?}");
        planned.total as f64 / growth as f64
    }
}

/// Each run in a process of its own, where nobody else's memory counts.
#[test]
#[cfg(target_os = "linux")]
fn a_run_takes_the_memory_that_it_says() {
    for number in 0..CASES.len() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["tune::one_run_in_this_process", "--exact", "--ignored", "--nocapture"]).env(CASE, number.to_string());
        let output = child.output().unwrap();
        assert!(output.status.success(), "{number}: {} {}", text(&output.stdout), text(&output.stderr));
        assert!(text(&output.stdout).contains("1 passed"), "{}", text(&output.stdout));
    }
}

#[test]
#[ignore = "is run by a_run_takes_the_memory_that_it_says, in a process of its own"]
fn one_run_in_this_process() {
    let Some(case) = std::env::var(CASE).ok().and_then(|number| CASES.get(number.parse::<usize>().ok()?)) else { return };
    let ratio = case.ratio();
    assert!((1.0..=2.0).contains(&ratio), "planned {ratio:.2} times what {} took", case.target);
}

#[test]
fn bad_input_is_told_from_bad_luck() {
    let dir = folder();
    fs::write(dir.path().join("binary"), [0xFF, 0x00, 0x12]).unwrap();
    fs::write(dir.path().join("nul.txt"), "a\0b").unwrap();
    fs::write(dir.path().join("short.txt"), "a few words").unwrap();
    fs::create_dir(dir.path().join("thesis")).unwrap();
    fs::write(dir.path().join("thesis/thesis.tex"), "years of work").unwrap();
    for (arguments, code, message) in [
        (&["--data", "absent.txt", "--json", "x"][..], 1, "absent.txt"),
        (&["--data", "text.txt", "binary", "--json", "x"], 2, "data[1]: binary is binary"),
        (&["--data", "nul.txt", "--json", "x"], 2, "data[0]: nul.txt is binary"),
        (&["--data", "short.txt", "--json", "x"], 2, "data: "),
        (&["--data", "text.txt", "--json", "x", "--estimator", "stee"], 2, "routing.estimator: 'stee' is unknown; did you mean ste?"),
        (&["--data", "text.txt", "--json", "x", "--dtype", "q8"], 1, "8-bit"),
        (&["--data", "text.txt", "--json", "x", "--max-memory", "1"], 1, "MiB are allowed: choose fewer micro windows"),
        (&["--data", "text.txt", "--json", "x", "--patience", "0"], 2, "stop.patience: must be above 0"),
        (&["--data", "text.txt", "--output", "thesis"], 1, "neither empty nor a checkpoint"),
        (&["--data", "text.txt"], 2, "--output"),
    ] {
        let output = tune(dir.path(), arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}
