//! `hardmax inspect`: what a checkpoint folder holds, without loading its weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
};

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    checkpoint::{Checkpoint, GenerationDefaults, TensorInfo},
    error::{Error, Result},
    model::{FeedForwardSpec, LayerSpec, ModelSpec, QkNorm, ReferenceRouting, RopeScaling},
    moe::policy::RoutingChoice,
};

/// Show what a checkpoint folder holds: model, routing, size, tensors.
///
/// Only JSON files and safetensors headers are read. Tensors are checked against config.json by name, shape and dtype;
/// the command fails where they do not fit.
#[derive(clap::Args, Debug)]
pub struct InspectArgs {
    /// Checkpoint folder in Hugging Face layout.
    pub dir: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
}

/// Prints the report; fails where the folder cannot be opened or its tensors do not fit config.json.
pub fn run(args: InspectArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let text = report(&checkpoint, args.json, args.tensors);
    match io::stdout().write_all(text.as_bytes()) {
        // The reader of a pipe may leave early.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => return Err(Error::io("stdout", e)),
        _ => {}
    }
    Ok(checkpoint.verify()?)
}

/// The report on an opened folder, as one JSON object or as text, with or without a list of all tensors.
pub fn report(checkpoint: &Checkpoint, json: bool, tensors: bool) -> String {
    let report = Report::new(checkpoint, tensors);
    if json { format!("{:#}\n", json!(report)) } else { report.to_string() }
}

/// All facts, in the order in which they are shown.
#[derive(Debug, Serialize)]
struct Report {
    path: PathBuf,
    /// "complete", or what is wrong with the tensors.
    state: String,
    model: Model,
    routing: Routing,
    generation: Value,
    size: Size,
    tensors: Tensors,
}

#[derive(Debug, Serialize)]
struct Model {
    family: String,
    vocab_size: usize,
    hidden_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    attention_bias: &'static str,
    qk_norm: &'static str,
    clip_qkv: Option<f32>,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: String,
    max_context: usize,
    tied_head: bool,
    layers: Vec<Layer>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Layer {
    kind: &'static str,
    sliding_window: Option<usize>,
    experts: Option<usize>,
    width: usize,
    shared_expert_width: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Routing {
    /// Whether config.json says how the router was trained.
    block: bool,
    estimator: String,
    reference: String,
    /// For each routed layer.
    serving: Vec<Serving>,
}

#[derive(Debug, Serialize)]
struct Serving {
    layer: usize,
    k: usize,
    weight_form: String,
}

#[derive(Debug, Serialize)]
struct Size {
    parameters: u64,
    /// Used by one token under the serving routing.
    active_parameters: u64,
    weights_f32_bytes: u64,
    weights_bf16_bytes: u64,
    /// One token in an f32 cache, all layers.
    kv_cache_bytes_per_token: u64,
}

#[derive(Debug, Serialize)]
struct Tensors {
    count: usize,
    bytes: u64,
    bytes_by_dtype: BTreeMap<String, u64>,
    files: BTreeSet<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    list: Vec<Tensor>,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    file: String,
    bytes: u64,
}

// === impl Report ===

impl Report {
    fn new(checkpoint: &Checkpoint, list: bool) -> Self {
        let spec = checkpoint.spec();
        Self {
            path: checkpoint.dir().to_path_buf(),
            state: checkpoint.verify().map_or_else(|e| e.to_string(), |()| "complete".into()),
            model: Model::new(spec),
            routing: Routing::new(spec, checkpoint.routing().is_some()),
            generation: generation(checkpoint.generation()),
            size: Size::new(spec),
            tensors: Tensors::new(checkpoint.tensors(), list),
        }
    }
}

impl Model {
    fn new(spec: &ModelSpec) -> Self {
        Self {
            family: spec.family.clone(),
            vocab_size: spec.vocab_size,
            hidden_size: spec.hidden_size,
            num_layers: spec.layers.len(),
            num_heads: spec.num_heads,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            attention_bias: match (spec.qkv_bias, spec.out_bias) {
                (false, false) => "none",
                (true, false) => "query, key, value",
                (false, true) => "output",
                (true, true) => "query, key, value, output",
            },
            qk_norm: match spec.qk_norm {
                QkNorm::None => "none",
                QkNorm::PerHead => "per head",
                QkNorm::Full => "full",
            },
            clip_qkv: spec.clip_qkv,
            rms_norm_eps: spec.rms_norm_eps,
            rope_theta: spec.rope.theta,
            rope_scaling: scaling(&spec.rope.scaling),
            max_context: spec.max_context,
            tied_head: spec.tied_head,
            layers: spec.layers.iter().map(Layer::new).collect(),
        }
    }
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::None => "none".into(),
        RopeScaling::Linear { factor } => format!("linear x{factor}"),
        RopeScaling::Yarn { factor, original_max_position, .. } => format!("yarn x{factor} from {original_max_position}"),
        RopeScaling::Llama3 { factor, original_max_position, .. } => format!("llama3 x{factor} from {original_max_position}"),
    }
}

impl Layer {
    fn new(layer: &LayerSpec) -> Self {
        let sliding_window = layer.sliding_window;
        match &layer.feed_forward {
            FeedForwardSpec::Dense { width } => {
                Self { kind: "dense", sliding_window, experts: None, width: *width, shared_expert_width: None }
            }
            FeedForwardSpec::Moe(moe) => Self {
                kind: "moe",
                sliding_window,
                experts: Some(moe.num_experts),
                width: moe.expert_width,
                shared_expert_width: moe.shared_expert_width,
            },
        }
    }

    fn describe(&self) -> String {
        let body = match self.experts {
            Some(experts) => format!("{experts} experts of width {}", self.width),
            None => format!("dense, width {}", self.width),
        };
        let shared = self.shared_expert_width.map_or_else(String::new, |width| format!(", shared expert of width {width}"));
        let window = self.sliding_window.map_or_else(String::new, |window| format!(", sliding window {window}"));
        format!("{body}{shared}{window}")
    }
}

impl Routing {
    fn new(spec: &ModelSpec, block: bool) -> Self {
        let serving =
            |(layer, moe): (usize, &crate::model::MoeSpec)| Serving { layer, k: moe.top_k, weight_form: moe.weight_form.to_string() };
        Self {
            block,
            estimator: spec.estimator.clone(),
            reference: match spec.reference {
                ReferenceRouting::OwnTopK { assumed: true } => "own top-k (assumed)".into(),
                ReferenceRouting::OwnTopK { assumed: false } => "own top-k".into(),
                other => match other.choice() {
                    RoutingChoice::Soft { temperature: Some(temperature) } => format!("soft, temperature {temperature}"),
                    choice => choice.to_string(),
                },
            },
            serving: spec.moe_layers().map(serving).collect(),
        }
    }
}

fn generation(defaults: &GenerationDefaults) -> Value {
    json!({
        "eos_token_ids": defaults.eos_token_ids,
        "bos_token_id": defaults.bos_token_id,
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "repetition_penalty": defaults.repetition_penalty,
        "do_sample": defaults.do_sample,
    })
}

impl Size {
    fn new(spec: &ModelSpec) -> Self {
        let (parameters, active_parameters) = spec.parameters();
        let kept = kept_in_f32(spec);
        let cache = 2 * spec.num_kv_heads * spec.head_dim * spec.layers.len() * size_of::<f32>();
        Self {
            parameters,
            active_parameters,
            weights_f32_bytes: 4 * parameters,
            weights_bf16_bytes: 2 * parameters + 2 * kept,
            kv_cache_bytes_per_token: cache as u64,
        }
    }
}

/// Parameters that are f32 whatever the dtype of the model: norms, biases, routers, gates of shared experts.
fn kept_in_f32(spec: &ModelSpec) -> u64 {
    let (d, q, k) = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
    let bias = if spec.qkv_bias { q + 2 * k } else { 0 } + if spec.out_bias { d } else { 0 };
    let qk_norm = match spec.qk_norm {
        QkNorm::None => 0,
        QkNorm::PerHead => 2 * spec.head_dim,
        QkNorm::Full => q + k,
    };
    let routed = spec.moe_layers().map(|(_, moe)| d * (moe.num_experts + usize::from(moe.shared_expert_width.is_some())));
    (d + spec.layers.len() * (2 * d + bias + qk_norm) + routed.sum::<usize>()) as u64
}

impl Tensors {
    fn new(tensors: impl Iterator<Item = TensorInfo>, list: bool) -> Self {
        let mut all = Self { count: 0, bytes: 0, bytes_by_dtype: BTreeMap::new(), files: BTreeSet::new(), list: Vec::new() };
        for TensorInfo { name, dtype, shape, file, bytes } in tensors {
            all.count += 1;
            all.bytes += bytes;
            *all.bytes_by_dtype.entry(dtype.clone()).or_default() += bytes;
            all.files.insert(file.clone());
            if list {
                all.list.push(Tensor { name, dtype, shape, file, bytes });
            }
        }
        all
    }
}

// === text ===

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.path.display())?;
        let Model { family, vocab_size, hidden_size, num_heads, num_kv_heads, head_dim, .. } = &self.model;
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<14} {value}");
        row("state", self.state.clone())?;
        row("family", family.clone())?;
        row("width", format!("{hidden_size}, vocabulary {vocab_size}{}", if self.model.tied_head { ", tied head" } else { "" }))?;
        row("attention", format!("{num_heads} heads, {num_kv_heads} key/value heads of width {head_dim}{}", self.model.attention()))?;
        row("rope", format!("theta {}, scaling {}", self.model.rope_theta, self.model.rope_scaling))?;
        row("context", format!("{} tokens", self.model.max_context))?;
        for (range, layer) in runs(&self.model.layers, |layer| layer.describe()) {
            row(&format!("layers {range}"), layer)?;
        }
        row("reference", self.routing.reference.clone())?;
        row("estimator", self.routing.estimator.clone())?;
        let serving = |serving: &Serving| format!("top-{} ({})", serving.k, serving.weight_form);
        let layers: Vec<_> = self.routing.serving.iter().map(|serving| serving.layer).collect();
        for (range, policy) in runs(&self.routing.serving, serving) {
            let name = |at: usize| layers.get(at).map(usize::to_string).unwrap_or_default();
            let range = if range.0 == range.1 { name(range.0) } else { format!("{}-{}", name(range.0), name(range.1)) };
            row("serving", format!("{policy}, layers {range}"))?;
        }
        let size = &self.size;
        row("parameters", format!("{} ({} active per token)", thousands(size.parameters), thousands(size.active_parameters)))?;
        row("memory", format!("{} in f32, {} in bf16", bytes(size.weights_f32_bytes), bytes(size.weights_bf16_bytes)))?;
        row("kv cache", format!("{} per token in f32", bytes(size.kv_cache_bytes_per_token)))?;
        let by_dtype: Vec<_> = self.tensors.bytes_by_dtype.iter().map(|(dtype, n)| format!("{} {dtype}", bytes(*n))).collect();
        let files = self.tensors.files.len();
        row("tensors", format!("{} in {files} file{}: {}", self.tensors.count, plural(files), by_dtype.join(", ")))?;
        for tensor in &self.tensors.list {
            writeln!(f, "    {:<64} {:<5} {:?} {}", tensor.name, tensor.dtype, tensor.shape, tensor.file)?;
        }
        Ok(())
    }
}

impl Model {
    /// What is special about attention.
    fn attention(&self) -> String {
        let mut text = String::new();
        for (name, value) in [("bias on", self.attention_bias), ("query and key norm", self.qk_norm)] {
            if value != "none" {
                // Writing to a String cannot fail.
                let _ = write!(text, ", {name} {value}");
            }
        }
        if let Some(clip) = self.clip_qkv {
            let _ = write!(text, ", clipped to {clip}");
        }
        text
    }
}

/// First and last index of items that are described alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run(usize, usize);

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == self.1 { write!(f, "{}", self.0) } else { write!(f, "{}-{}", self.0, self.1) }
    }
}

/// Neighbours that are described alike.
fn runs<T>(items: &[T], describe: impl Fn(&T) -> String) -> Vec<(Run, String)> {
    let mut runs: Vec<(Run, String)> = Vec::new();
    for (index, text) in items.iter().map(describe).enumerate() {
        match runs.last_mut() {
            Some((run, last)) if *last == text => run.1 = index,
            _ => runs.push((Run(index, index), text)),
        }
    }
    runs
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// 1234567 as 1,234,567.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = "B";
    for next in units {
        unit = next;
        if value < 1024.0 || next == "TiB" {
            break;
        }
        value /= 1024.0;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([thousands(0), thousands(999), thousands(1000), thousands(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([bytes(0), bytes(1023), bytes(1024), bytes(3 << 29)], ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]);
    }

    #[test]
    fn equal_neighbours_become_one_run() {
        let runs = runs(&[1, 1, 2, 1], ToString::to_string);
        let expected = [(Run(0, 1), "1"), (Run(2, 2), "2"), (Run(3, 3), "1")].map(|(run, text)| (run, text.to_string()));
        assert_eq!(runs, expected);
    }
}
