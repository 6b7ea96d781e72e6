//! `hardmax fidelity`: how far hard serving is from the routing that a checkpoint was trained under.

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
};

use candle_core::DType;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokenizers::Tokenizer;

use super::compute::ComputeArgs;
use crate::{
    checkpoint::{Checkpoint, LoadOptions},
    error::{Error, Result},
    fidelity::{
        case::Case,
        corpus::Corpus,
        study::{Models, Options, study},
    },
    model::{
        ModelSpec,
        load::{DeviceKind, ServingModel, ServingOptions, WeightType, load_weights},
    },
    moe::policy::RoutingChoice,
    ops::cpu::Reduction,
};

/// Windows without --window, where the context is longer.
const WINDOW: usize = 1024;

/// Measure the fidelity gap of a checkpoint: how far its hard routings are from the one it was trained under.
///
/// Runs all routings side by side over text and compares them with the reference routing, layer by layer and at the logits. Says for each
/// whether it is the trained function and whether it predicts as well, with stated thresholds against a measured noise floor; which layers
/// are to blame; what a k of its own for each layer would buy; and which tokens each expert takes. The report goes to standard output,
/// progress to standard error.
#[derive(clap::Args, Debug)]
pub struct FidelityArgs {
    /// Checkpoint folder in Hugging Face layout.
    #[arg(long, env = "HARDMAX_MODEL", default_value = "models/demo")]
    pub model: PathBuf,
    /// What `hardmax tune` changed: a file that it wrote over this very checkpoint.
    #[arg(long, value_name = "FILE")]
    pub delta: Option<PathBuf>,
    /// Text files, UTF-8, a document each.
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "token_ids")]
    pub text: Vec<PathBuf>,
    /// Files of token ids instead, numbers with spaces or commas between them: for a checkpoint without a tokenizer.
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub token_ids: Vec<PathBuf>,
    /// Served routings: native, top-K, top-K:raw|renorm|unit, soft or soft:TEMPERATURE. One that is the reference is not run twice.
    #[arg(long, value_name = "ROUTING", value_delimiter = ',', default_value = "native,top-1,top-2,soft")]
    pub routing: Vec<RoutingChoice>,
    /// One more: experts per token of each MoE layer in order of depth, as 1,2,1,1. May be given more than once.
    #[arg(long, value_name = "K,K,...", value_parser = ks)]
    pub layer_k: Vec<Ks>,
    /// What to compare with. Default: what the checkpoint says that it was trained under, else its own top-k.
    #[arg(long, value_name = "ROUTING")]
    pub reference: Option<RoutingChoice>,
    /// Tokens that are read together. Default: the context of the model, at most 1024.
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Most tokens of the text.
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub max_tokens: usize,
    /// Tokens on which native routing is compared with itself in other arithmetic, the noise floor; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub floor_tokens: usize,
    /// Tokens on which a k for each layer is chosen, and as many on which the choice is run; 0 leaves it out.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub advice_tokens: usize,
    /// Budgets of advice: the mean k over layers.
    #[arg(long, value_name = "K", value_delimiter = ',', default_value = "1.25,1.5,1.75")]
    pub mean_k: Vec<f64>,
    /// Write everything that was measured to this file, as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw pictures into this folder, as SVG and PNG.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where the model runs, and how.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// A value of `--layer-k`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ks(Vec<usize>);

fn ks(text: &str) -> std::result::Result<Ks, String> {
    let number = |part: &str| part.trim().parse().map_err(|_| format!("'{part}' is no number of experts; as 1,2,1,1"));
    text.split(',').map(number).collect::<std::result::Result<_, _>>().map(Ks)
}

/// Measures and prints.
pub fn run(args: FidelityArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let spec = checkpoint.spec();
    let options = args.options(spec)?;
    let mut corpus = Corpus::new(args.window(spec)?);
    let tokenizer = if args.text.is_empty() { None } else { Some(checkpoint.tokenizer()?) };
    if let Some(tokenizer) = &tokenizer {
        corpus.add_text(&args.text, tokenizer)?;
    }
    corpus.add_token_ids(&args.token_ids)?;
    if let Some(folder) = &args.out {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    }
    let models = args.models(&checkpoint)?;
    let bar = progress_bar();
    let mut progress = |what: &str, tokens: usize| {
        if bar.message() != what {
            bar.reset();
            bar.set_message(what.to_owned());
        }
        bar.inc(tokens as u64);
    };
    let report = study(&models, &corpus, &options, &|token| decode(tokenizer.as_ref(), token), &mut progress)?;
    bar.finish_and_clear();
    if let Some(path) = &args.json {
        let json = serde_json::to_vec_pretty(&report).map_err(|error| Error::Internal(format!("the report has no JSON form: {error}")))?;
        fs::write(path, json).map_err(|error| Error::io(path, error))?;
    }
    if let Some(folder) = &args.out {
        let names = report.draw(folder)?;
        tracing::info!("{}: {} as .svg and .png", folder.display(), names.join(", "));
    }
    match io::stdout().write_all(report.to_string().as_bytes()) {
        // The reader of a pipe may leave early.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("stdout", e)),
        _ => Ok(()),
    }
}

impl FidelityArgs {
    fn options(&self, spec: &ModelSpec) -> Result<Options> {
        if spec.moe_layers().next().is_none() {
            return Err(Error::invalid("--model", "it has no routed layer, and so no fidelity gap"));
        }
        if let Some(mean_k) = self.mean_k.iter().find(|mean_k| !(mean_k.is_finite() && **mean_k >= 1.0)) {
            return Err(Error::invalid("--mean-k", format!("{mean_k} is not a number from 1")));
        }
        for (flag, choice) in
            self.routing.iter().map(|choice| ("--routing", choice)).chain(self.reference.iter().map(|c| ("--reference", c)))
        {
            spec.check_routing(&(*choice).into()).map_err(|error| Error::invalid(flag, format!("{choice}: {error}")))?;
        }
        let layer_k = self.layer_k.iter().map(|ks| Case::layer_k("--layer-k", spec, &ks.0));
        Ok(Options {
            reference: self.reference,
            cases: self.routing.iter().map(|&choice| Ok(choice.into())).chain(layer_k).collect::<Result<_>>()?,
            max_tokens: self.max_tokens,
            floor_tokens: self.floor_tokens,
            advice_tokens: self.advice_tokens,
            mean_k: self.mean_k.clone(),
        })
    }

    fn window(&self, spec: &ModelSpec) -> Result<usize> {
        let window = self.window.unwrap_or(spec.max_context.min(WINDOW));
        if window < 2 || window > spec.max_context {
            return Err(Error::invalid("--window", format!("{window} is not from 2 to {}, the context of the model", spec.max_context)));
        }
        Ok(window)
    }

    /// The model as it is to be judged and, on the CPU, in other arithmetic: the order of sums, and the other width of weights.
    fn models(&self, checkpoint: &Checkpoint) -> Result<Models> {
        let options = self.compute.options();
        let device = options.device.open()?;
        let load = |weights: WeightType| {
            let options = LoadOptions { dtype: weights.dtype(options.device), device: device.clone(), progress: true };
            load_weights(checkpoint, self.delta.as_deref(), &options)
        };
        let spec = || std::sync::Arc::new(checkpoint.spec().clone());
        let weights = load(options.weights)?;
        let mut others = Vec::new();
        if self.floor_tokens > 0 {
            if options.device == DeviceKind::Cpu {
                let reduction = match options.reduction {
                    Reduction::Fastest => Reduction::BatchInvariant,
                    Reduction::BatchInvariant => Reduction::Fastest,
                };
                let other = ServingModel::new(spec(), weights.clone(), ServingOptions { reduction, ..options })?;
                others.push((other, "the same weights, other batches and order of sums".to_owned()));
            } else {
                let other = ServingModel::new(spec(), weights.clone(), options)?;
                others.push((other, "the same weights, other batches".to_owned()));
            }
            let (narrow, name) = match options.weights.dtype(options.device) {
                DType::F32 => (WeightType::Bf16, "bf16 weights"),
                _ => (WeightType::F32, "f32 weights"),
            };
            others.push((ServingModel::new(spec(), load(narrow)?, ServingOptions { weights: narrow, ..options })?, name.to_owned()));
        }
        Ok(Models { served: ServingModel::new(spec(), weights, options)?, others })
    }
}

fn decode(tokenizer: Option<&Tokenizer>, token: u32) -> String {
    let text = tokenizer.and_then(|tokenizer| tokenizer.decode(&[token], false).ok()).filter(|text| !text.is_empty());
    text.unwrap_or_else(|| format!("#{token}"))
}

fn progress_bar() -> ProgressBar {
    let target = if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg}: {pos} tokens, {per_sec}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::with_draw_target(None, target).with_style(style)
}
