//! Rotary embedding parameters: `rope_parameters` (transformers 5), `rope_scaling` and a top-level `rope_theta` (before),
//! with the precedence that transformers 5.23 gives them.

use super::{CheckpointError, fields::Fields};
use crate::model::{RopeScaling, RopeSpec};

type Result<T> = std::result::Result<T, CheckpointError>;

/// What a family's defaults and the rest of config.json contribute.
pub(super) struct RopeContext {
    pub(super) default_theta: f64,
    pub(super) max_context: usize,
}

/// Reads the rotary embedding.
pub(super) fn read_rope(config: &Fields<'_>, context: &RopeContext) -> Result<RopeSpec> {
    let top_theta = read_theta(config)?;
    refuse_partial(config)?;
    let original = config.count("original_max_position_embeddings")?;
    let (legacy, current) = (config.object("rope_scaling")?, config.object("rope_parameters")?);
    let filled = |object: &Fields<'_>| object.keys().next().is_some();
    let key = if legacy.as_ref().is_some_and(filled) { "rope_scaling" } else { "rope_parameters" };
    if key == "rope_scaling" && current.as_ref().is_some_and(filled) {
        tracing::warn!(file = %config.file().display(), "both rope_scaling and rope_parameters: rope_scaling is used");
    }
    let Some(rope) = legacy.filter(filled).or(current) else {
        return Ok(RopeSpec { theta: top_theta.unwrap_or(context.default_theta), scaling: RopeScaling::None });
    };
    refuse_partial(&rope)?;
    let theta = read_theta(&rope)?.or(top_theta).unwrap_or(context.default_theta);
    let original = Original { top: original, max_context: context.max_context };
    let scaling = read_scaling(&rope, theta, &original)?;
    for band in ["mrope_section", "short_factor", "long_factor"] {
        if rope.get(band).is_some() {
            return Err(rope.unsupported(band, "leave it out"));
        }
    }
    rope.warn_unused();
    Ok(RopeSpec { theta, scaling })
}

/// From 1: below, frequencies would rise with the dimension, and soon not be finite.
fn read_theta(fields: &Fields<'_>) -> Result<Option<f64>> {
    fields.read("rope_theta", "a number from 1", |value| value.as_f64().filter(|theta| theta.is_finite() && *theta >= 1.0))
}

fn refuse_partial(fields: &Fields<'_>) -> Result<()> {
    match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(fields.unsupported("partial_rotary_factor", "only 1, rotation of the whole head")),
        _ => Ok(()),
    }
}

/// Where the context of pre-training may be stated. The top level wins, the longest context is the last resort.
struct Original {
    top: Option<usize>,
    max_context: usize,
}

impl Original {
    fn read(&self, rope: &Fields<'_>) -> Result<usize> {
        let nested = rope.count("original_max_position_embeddings")?;
        Ok(self.top.or(nested).unwrap_or(self.max_context))
    }
}

fn read_scaling(rope: &Fields<'_>, theta: f64, original: &Original) -> Result<RopeScaling> {
    let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    let old_name = rope.string("type")?;
    match rope.string("rope_type")?.or(old_name).unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: required(rope, "factor", factor(rope)?)? }),
        "yarn" => read_yarn(rope, theta, original.read(rope)?, original.max_context),
        "llama3" => read_llama3(rope, original.read(rope)?),
        _ => Err(rope.unsupported(key, "default, linear, yarn, llama3")),
    }
}

fn required<T>(rope: &Fields<'_>, key: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| rope.wrong(key, "a value, which this rope_type needs"))
}

fn factor(rope: &Fields<'_>) -> Result<Option<f64>> {
    rope.read("factor", "a number from 1", |value| value.as_f64().filter(|f| f.is_finite() && *f >= 1.0))
}

fn read_yarn(rope: &Fields<'_>, theta: f64, original_max_position: usize, max_context: usize) -> Result<RopeScaling> {
    if theta <= 1.0 {
        return Err(rope.wrong("rope_theta", "a number above 1 with rope_type yarn"));
    }
    let factor = match factor(rope)? {
        Some(factor) => factor,
        // Stated as null, it is the ratio of the two contexts.
        None if rope.has("factor") && max_context >= original_max_position => max_context as f64 / original_max_position as f64,
        None => return required(rope, "factor", None),
    };
    let or_default = |key: &str, default: f64| -> Result<f64> {
        let zero_or_more = rope.read(key, "a number from 0", |value| value.as_f64().filter(|n| n.is_finite() && *n >= 0.0))?;
        Ok(zero_or_more.filter(|n| *n > 0.0).unwrap_or(default))
    };
    let (beta_fast, beta_slow) = (or_default("beta_fast", 32.0)?, or_default("beta_slow", 1.0)?);
    if beta_fast < beta_slow {
        return Err(rope.wrong("beta_fast", format!("a number from beta_slow, {beta_slow}")));
    }
    let (mscale, mscale_all_dim) = (or_default("mscale", 0.0)?, or_default("mscale_all_dim", 0.0)?);
    let attention_factor = match rope.positive_f32("attention_factor")? {
        Some(factor) => Some(factor),
        None if mscale > 0.0 && mscale_all_dim > 0.0 => Some(magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)),
        None => None,
    };
    if attention_factor.is_some_and(|factor| !(factor as f32).is_normal()) {
        return Err(rope.wrong("mscale", format!("a number that makes a finite factor with mscale_all_dim, {mscale_all_dim}")));
    }
    let truncate = rope.boolean("truncate")?.unwrap_or(true);
    Ok(RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor, truncate })
}

fn magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn read_llama3(rope: &Fields<'_>, original_max_position: usize) -> Result<RopeScaling> {
    let factor = required(rope, "factor", factor(rope)?)?;
    let low_freq_factor = required(rope, "low_freq_factor", rope.positive("low_freq_factor")?)?;
    let high_freq_factor = required(rope, "high_freq_factor", rope.positive("high_freq_factor")?)?;
    if high_freq_factor <= low_freq_factor {
        return Err(rope.wrong("high_freq_factor", format!("a number above low_freq_factor, {low_freq_factor}")));
    }
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position })
}
