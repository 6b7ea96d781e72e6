//! The recipe of a training run: a TOML file, checked once.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::routing::{RoutingConfig, RoutingPlan, RunShape};
use crate::{
    error::{Error, Result},
    model::{FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling, RopeSpec},
    moe::estimator::Purpose,
};

/// Tokens of a step that is no mistake.
pub(crate) const MAX_TOKENS: usize = 1 << 24;

/// Parameters of a model that is no mistake: with gradients and moments 256 GiB.
const MAX_PARAMETERS: u128 = 1 << 34;

/// A training run. Paths are relative to the folder of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the finished checkpoint.
    pub output: PathBuf,
    /// Folder of log, curves and the state that `--resume` continues from.
    #[serde(skip_serializing)]
    pub work: PathBuf,
    /// Text.
    pub data: DataConfig,
    /// Sizes.
    pub model: ModelConfig,
    /// How the router is trained, and served afterwards.
    pub routing: RoutingConfig,
    /// AdamW and its learning rate.
    pub optimizer: OptimizerConfig,
    /// Length, batch, evaluation.
    pub run: RunConfig,
    /// Defaults of generation, written to generation_config.json.
    #[serde(default, skip_serializing)]
    pub generation: GenerationConfig,
}

/// What a request gets that does not say otherwise. Left out: greedy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationConfig {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
}

/// Text files, UTF-8.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// To train on; the tokenizer is trained on them too.
    pub train: Vec<PathBuf>,
    /// To measure perplexity on.
    pub heldout: Vec<PathBuf>,
    /// Separates documents; an end-of-text token is put in its place. Every file ends a document too.
    pub separator: String,
    /// Tokens of the byte-level BPE vocabulary.
    pub vocab_size: usize,
}

/// A decoder in the shape of Mixtral: every layer routed, no biases, no query and key norms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Experts per layer.
    pub experts: usize,
    /// Hidden width of an expert.
    pub expert_width: usize,
    /// Longest sequence, also the length of training windows.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The head is the embedding.
    pub tied_head: bool,
}

/// AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Last learning rate over the peak.
    pub final_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Decoupled; matrices only.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Gradients are scaled down to this global norm.
    pub clip_norm: f64,
}

impl OptimizerConfig {
    /// Checks everything for a run of `steps`; `root` is the path of the table, for messages.
    ///
    /// # Errors
    /// `InvalidArgument` that names the field.
    pub fn check(&self, root: &str, steps: usize) -> Result<()> {
        let ensure =
            |good: bool, field: &str, message: &str| if good { Ok(()) } else { Err(Error::invalid(format!("{root}.{field}"), message)) };
        ensure(self.weight_decay.is_finite() && self.weight_decay >= 0.0, "weight_decay", "must not be negative")?;
        ensure(self.learning_rate > 0.0 && self.learning_rate.is_finite(), "learning_rate", "must be above 0")?;
        ensure((0.0..=1.0).contains(&self.final_ratio), "final_ratio", "must be from 0 to 1")?;
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            ensure((0.0..1.0).contains(&beta), field, "must be at least 0 and below 1")?;
        }
        let never = "must be below run.steps: the learning rate would never reach its peak, and final_ratio would have no effect";
        ensure(self.warmup_steps < steps, "warmup_steps", never)?;
        ensure(self.clip_norm > 0.0 && self.clip_norm.is_finite(), "clip_norm", "must be above 0")
    }
}

/// Length, batch, evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Windows of `model.context` tokens per step.
    pub batch: usize,
    /// Of everything random.
    pub seed: u64,
    /// Steps between evaluations.
    pub eval_every: usize,
    /// Held-out tokens per evaluation during the run; the last one takes all.
    pub eval_tokens: usize,
    /// Steps between saved states.
    pub save_every: usize,
    /// Steps in a row without finite gradients after which the run fails: none of them moved a weight. 20 unless stated.
    #[serde(default = "skip_limit")]
    pub skip_limit: usize,
}

fn skip_limit() -> usize {
    20
}

impl TrainConfig {
    /// Reads and checks `path`; paths inside become relative to its folder.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
        let mut config: Self = toml::from_str(&text).map_err(|error| Error::invalid(path.display().to_string(), error.to_string()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.output = folder.join(&config.output);
        config.work = folder.join(&config.work);
        config.data.train.iter_mut().chain(&mut config.data.heldout).for_each(|file| *file = folder.join(&file));
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let ensure = |good: bool, field: &str, message: &str| if good { Ok(()) } else { Err(Error::invalid(field, message)) };
        let (model, optimizer, run) = (&self.model, &self.optimizer, &self.run);
        for (field, size) in [
            ("model.hidden_size", model.hidden_size),
            ("model.layers", model.layers),
            ("model.expert_width", model.expert_width),
            ("run.steps", run.steps),
            ("run.batch", run.batch),
            ("run.eval_every", run.eval_every),
            ("run.save_every", run.save_every),
            ("run.skip_limit", run.skip_limit),
        ] {
            ensure(size > 0, field, "must be above 0")?;
        }
        ensure(!self.data.train.is_empty(), "data.train", "names no file")?;
        ensure(!self.data.heldout.is_empty(), "data.heldout", "names no file")?;
        ensure(!self.data.separator.is_empty(), "data.separator", "is empty")?;
        ensure((300..=65_536).contains(&self.data.vocab_size), "data.vocab_size", "must be from 300 to 65536")?;
        ensure(
            model.heads > 0 && model.hidden_size.is_multiple_of(model.heads.saturating_mul(2)),
            "model.heads",
            "must divide half of hidden_size",
        )?;
        ensure(model.kv_heads > 0 && model.heads.is_multiple_of(model.kv_heads), "model.kv_heads", "must divide heads")?;
        ensure(model.experts >= 2, "model.experts", "must be at least 2")?;
        ensure(model.layers <= 512, "model.layers", "must be at most 512")?; // The graph is walked recursively.
        ensure(model.layers.saturating_mul(model.experts) <= 1 << 16, "model.experts", "must be at most 65536 in all layers together")?;
        ensure(self.parameters() <= MAX_PARAMETERS, "model", &format!("must have at most {MAX_PARAMETERS} parameters"))?;
        ensure(model.context >= 8, "model.context", "must be at least 8")?;
        ensure(model.rope_theta > 1.0 && model.rope_theta.is_finite(), "model.rope_theta", "must be above 1")?;
        optimizer.check("optimizer", run.steps)?;
        let generation = &self.generation;
        ensure(generation.temperature.is_none_or(|t| t.is_finite() && t >= 0.0), "generation.temperature", "must be at least 0")?;
        ensure(generation.top_p.is_none_or(|p| p > 0.0 && p <= 1.0), "generation.top_p", "must be above 0 and at most 1")?;
        ensure(run.eval_tokens >= 2, "run.eval_tokens", "must be at least 2: the second is the first to be predicted")?;
        let plan = self.plan()?;
        self.check_batch(plan.estimator(0).copies())
    }

    /// A step's tokens, of which a score function runs several copies.
    fn check_batch(&self, copies: usize) -> Result<()> {
        if self.run.batch.saturating_mul(self.model.context).saturating_mul(copies) <= MAX_TOKENS {
            return Ok(());
        }
        let of_copies = if copies > 1 { format!(" with its {copies} copies") } else { String::new() };
        Err(Error::invalid("run.batch", format!("must be at most {MAX_TOKENS} tokens per step{of_copies}")))
    }

    /// How the routers learn.
    ///
    /// # Errors
    /// As [`RoutingConfig::plan`]; none for a recipe that [`TrainConfig::read`] has returned.
    pub fn plan(&self) -> Result<RoutingPlan> {
        let run = RunShape { experts: self.model.experts, steps: self.run.steps, purpose: Purpose::Train, teacher: false };
        self.routing.plan(run)
    }

    /// Parameters of the large matrices, at most.
    fn parameters(&self) -> u128 {
        let model = &self.model;
        let [d, layers, experts, f] = [model.hidden_size, model.layers, model.experts, model.expert_width].map(|n| n as u128);
        // No product of sizes of 64 bits may overflow: what is larger than the limit by itself stays just so.
        let [d, f] = [d, f].map(|n| n.min(MAX_PARAMETERS));
        2 * self.data.vocab_size as u128 * d + layers * (4 * d * d + experts * d * (3 * f + 1))
    }

    /// The model that this recipe makes under its plan, for a tokenizer of `vocab_size` tokens.
    pub fn spec(&self, plan: &RoutingPlan, vocab_size: usize) -> ModelSpec {
        let model = &self.model;
        let moe = MoeSpec {
            num_experts: model.experts,
            expert_width: model.expert_width,
            top_k: self.routing.serve_k,
            weight_form: plan.estimator(self.run.steps).serve,
            shared_expert_width: None,
        };
        ModelSpec {
            family: "mixtral".into(),
            vocab_size,
            hidden_size: model.hidden_size,
            num_heads: model.heads,
            num_kv_heads: model.kv_heads,
            head_dim: model.hidden_size / model.heads,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::None,
            clip_qkv: None,
            rms_norm_eps: 1e-5,
            rope: RopeSpec { theta: model.rope_theta, scaling: RopeScaling::None },
            max_context: model.context,
            tied_head: model.tied_head,
            layers: vec![LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) }; model.layers],
            reference: plan.reference(self.routing.serve_k),
            estimator: self.routing.estimator.clone(),
        }
    }
}
