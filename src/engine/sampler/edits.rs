//! What a request changes in the model's logits before a token is chosen.

use std::collections::HashSet;

use super::super::request::GenerateParams;

/// Penalties, bias, and the tokens that would end a continuation too early.
#[derive(Debug)]
pub(super) struct Edits {
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// Tokens that a penalty is due for, by id.
    seen: Vec<Seen>,
    bias: Vec<(u32, f32)>,
    /// Tokens that may not be drawn yet.
    ends: Vec<u32>,
    /// How many tokens until they may.
    early: usize,
}

#[derive(Debug)]
struct Seen {
    token: u32,
    /// In the continuation; 0 if it is in the prompt only.
    count: u32,
}

impl Edits {
    pub(super) fn new(params: &GenerateParams, prompt: &[u32], eos_token_ids: &HashSet<u32>) -> Self {
        let eos = eos_token_ids.iter().filter(|_| !params.ignore_eos);
        let ends = match params.min_new_tokens {
            0 => Vec::new(),
            _ => eos.chain(&params.stop_token_ids).copied().collect(),
        };
        let mut tokens = if params.repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() };
        tokens.sort_unstable();
        tokens.dedup();
        Self {
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            seen: tokens.into_iter().map(|token| Seen { token, count: 0 }).collect(),
            bias: params.logit_bias.clone(),
            ends,
            early: params.min_new_tokens,
        }
    }

    /// Whether the next row stays as it is.
    pub(super) fn idle(&self) -> bool {
        self.seen.is_empty() && self.bias.is_empty() && (self.early == 0 || self.ends.is_empty())
    }

    /// Changes a finite row `[V]`. It stays finite, but for negative infinity where a token may not be drawn.
    pub(super) fn apply(&self, row: &mut [f32]) {
        for &Seen { token, count } in &self.seen {
            if let Some(logit) = row.get_mut(token as usize) {
                let scaled = if *logit >= 0.0 { *logit / self.repetition } else { *logit * self.repetition };
                let presence = if count > 0 { self.presence } else { 0.0 };
                *logit = finite(finite(scaled) - self.frequency * count as f32 - presence);
            }
        }
        for &(token, bias) in &self.bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit = finite(*logit + bias);
            }
        }
        if self.early > 0 {
            for &token in &self.ends {
                if let Some(logit) = row.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Counts a token of the continuation.
    pub(super) fn record(&mut self, token: u32) {
        self.early = self.early.saturating_sub(1);
        if self.repetition == 1.0 && self.presence == 0.0 && self.frequency == 0.0 {
            return;
        }
        match self.seen.binary_search_by_key(&token, |seen| seen.token) {
            Ok(at) => {
                if let Some(seen) = self.seen.get_mut(at) {
                    seen.count = seen.count.saturating_add(1);
                }
            }
            Err(at) => self.seen.insert(at, Seen { token, count: 1 }),
        }
    }
}

fn finite(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}
