//! generation_config.json and the token ids of config.json: what a request gets that does not say otherwise.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{CheckpointError, family::Family, fields::Fields};

type Result<T> = std::result::Result<T, CheckpointError>;

/// Defaults of the checkpoint for generation. `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a sequence; from generation_config.json, else config.json.
    pub eos_token_ids: Vec<u32>,
    /// Token that starts a sequence.
    pub bos_token_id: Option<u32>,
    /// 0 or more; 0 is greedy.
    pub temperature: Option<f32>,
    /// Above 0, at most 1.
    pub top_p: Option<f32>,
    /// Candidates to sample from; a 0 in the file, which means all, becomes `None`.
    pub top_k: Option<usize>,
    /// Above 0; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
}

/// Special tokens as one file states them. The outer `None` is silence; an inner one is `null`: there is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct TokenIds {
    eos: Option<Vec<u32>>,
    bos: Option<Option<u32>>,
}

impl TokenIds {
    /// Reads `eos_token_id` (one or a list) and `bos_token_id`. Ids without a row in the embedding cannot occur: they
    /// are dropped with a warning, as published files have them.
    pub(super) fn read(fields: &Fields<'_>, vocab_size: usize) -> Result<Self> {
        let usable = |key: &str, id: i64| {
            let id = u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size);
            if id.is_none() {
                tracing::warn!(file = %fields.file().display(), field = key, "a token id outside the vocabulary is ignored");
            }
            id
        };
        let eos = fields.read("eos_token_id", "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(Value::as_i64).collect(),
            one => one.as_i64().map(|id| vec![id]),
        })?;
        let bos = fields.read("bos_token_id", "a token id", Value::as_i64)?;
        let eos = eos.map(|ids: Vec<_>| ids.into_iter().filter_map(|id| usable("eos_token_id", id)).collect());
        let bos = bos.map(|id| usable("bos_token_id", id));
        Ok(Self {
            eos: eos.or_else(|| fields.has("eos_token_id").then(Vec::new)),
            bos: bos.or_else(|| fields.has("bos_token_id").then_some(None)),
        })
    }

    /// Fills in what the family has where config.json is silent.
    pub(super) fn or_defaults(self, config: &Fields<'_>, family: &Family, vocab_size: usize) -> Self {
        let inside = |id: Option<u32>, key: &str| id.filter(|id| (*id as usize) < vocab_size && !config.has(key));
        Self {
            eos: self.eos.or_else(|| inside(family.defaults.eos_token_id, "eos_token_id").map(|id| vec![id])),
            bos: self.bos.or_else(|| inside(family.defaults.bos_token_id, "bos_token_id").map(Some)),
        }
    }
}

impl GenerationDefaults {
    /// From generation_config.json, where there is one, and what config.json says of tokens.
    pub(super) fn read(file: &Path, value: Option<&Value>, config: TokenIds, vocab_size: usize) -> Result<Self> {
        let empty = Value::Object(Map::new());
        let fields = Fields::new(file, value.unwrap_or(&empty))?;
        let own = TokenIds::read(&fields, vocab_size)?;
        // As f32, which they become: a huge temperature is infinite there, and a tiny penalty is 0.
        let number = |key: &str, expected: &str, right: fn(f32) -> bool| {
            fields.read(key, expected, |value| value.as_f64().map(|n| n as f32).filter(|n| n.is_finite() && right(*n)))
        };
        Ok(Self {
            // `null` in this file is how libraries write "not set", hence no statement.
            eos_token_ids: own.eos.filter(|ids| !ids.is_empty()).or(config.eos).unwrap_or_default(),
            bos_token_id: own.bos.flatten().or(config.bos.flatten()),
            temperature: number("temperature", "a number from 0", |n| n >= 0.0)?,
            top_p: number("top_p", "a number above 0, at most 1", |n| n > 0.0 && n <= 1.0)?,
            top_k: fields.integer("top_k")?.filter(|k| *k > 0),
            repetition_penalty: number("repetition_penalty", "a number above 0", |n| n > 0.0)?,
            do_sample: fields.boolean("do_sample")?,
        })
    }

    /// The token ids as both files write them.
    pub(super) fn token_ids(&self) -> (Value, Value) {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        (json!(self.bos_token_id), eos)
    }

    /// As generation_config.json.
    pub(super) fn to_json(&self) -> Value {
        let (bos, eos) = self.token_ids();
        let mut all = json!({ "bos_token_id": bos, "eos_token_id": eos });
        if let Value::Object(map) = &mut all {
            let stated = [
                ("temperature", self.temperature.map(short)),
                ("top_p", self.top_p.map(short)),
                ("top_k", self.top_k.map(|n| json!(n))),
                ("repetition_penalty", self.repetition_penalty.map(short)),
                ("do_sample", self.do_sample.map(|n| json!(n))),
            ];
            map.extend(stated.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))));
        }
        all
    }
}

/// The shortest decimal that reads back as `number`: 0.7, not 0.699999988.
pub(super) fn short(number: f32) -> Value {
    json!(number.to_string().parse().unwrap_or(f64::from(number)))
}
