//! Capacity: at most so many rows for each expert in training, and what becomes of the rest.
//!
//! Serving is dropless: with drops the answer to one request would depend on its neighbours in the batch.

use serde::{Deserialize, Serialize};

use super::choices::{ChoiceRows, Choices};
use crate::error::{Error, Result};

/// The limit on rows per expert: `ceil(factor · k · T / E)`.
///
/// With k inside, as Megatron-LM counts: a factor of 1 is just enough for an even load. Mesh-TensorFlow and flaxformer
/// leave k out; their 1.25 at top-2 is 0.625 here.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// Room over fair share, above 0.
    pub factor: f64,
    /// What becomes of a choice for which there is no room.
    #[serde(default)]
    pub overflow: Overflow,
    /// Who gets the room.
    #[serde(default)]
    pub order: Order,
}

/// What becomes of a choice for which there is no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// It is left out; a token without any choice passes by the layer on the residual stream.
    #[default]
    Drop,
    /// The token gets its next-best expert that has room; if there is none, the choice is dropped.
    Reroute,
}

/// Who gets the room. First choices always come before second ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Earlier tokens (Switch Transformer).
    #[default]
    Position,
    /// Higher probabilities (batch-prioritised; not causal, so for training only).
    Probability,
}

/// What [`Capacity::apply`] changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapacityReport {
    /// Choices left out.
    pub dropped: u64,
    /// Choices replaced by another expert.
    pub rerouted: u64,
}

impl Capacity {
    /// Rows that each expert may have, at least 1.
    pub fn rows(&self, tokens: usize, k: usize, experts: usize) -> usize {
        ((self.factor * (k * tokens) as f64 / experts.max(1) as f64).ceil() as usize).max(1)
    }

    /// Refuses a factor that is not above 0. `field` is the setting's path.
    pub fn check(&self, field: &str) -> Result<()> {
        match self.factor > 0.0 && self.factor.is_finite() {
            true => Ok(()),
            false => Err(Error::invalid(format!("{field}.factor"), "must be above 0")),
        }
    }

    /// Takes from `choices` what does not fit. `p [T, E]` ranks the experts of a token for re-routing, and tokens under
    /// [`Order::Probability`]; `k` is the number of choices that a token makes.
    pub fn apply(&self, choices: &mut Choices, p: &[f64], experts: usize, k: usize) -> CapacityReport {
        let rows = choices.rows();
        let mut fill =
            Fill { room: vec![self.rows(rows.tokens(), k, experts); experts], rows: taken(rows), report: CapacityReport::default() };
        let mut overflow = Vec::new();
        let ranks = (0..rows.tokens()).map(|t| rows.of(t).len()).max().unwrap_or(0);
        for rank in 0..ranks {
            for token in self.sequence(rows, p, experts, rank) {
                if !fill.keep(token, rank) {
                    overflow.push((token, rank));
                }
            }
        }
        for (token, rank) in overflow {
            match self.overflow {
                Overflow::Drop => fill.report.dropped += 1,
                Overflow::Reroute => fill.reroute(token, rank, &p[token * experts..][..experts]),
            }
        }
        let Fill { rows, report, .. } = fill;
        *choices = Choices::from_rows(rows.iter().map(|row| row.iter().filter_map(|slot| slot.expert()).collect::<Vec<_>>()));
        report
    }

    /// Tokens that make a choice of this rank, in the order in which they are served.
    fn sequence(&self, rows: ChoiceRows<'_>, p: &[f64], experts: usize, rank: usize) -> Vec<usize> {
        let mut tokens: Vec<usize> = (0..rows.tokens()).filter(|&t| rows.of(t).len() > rank).collect();
        if self.order == Order::Probability {
            let score = |t: usize| p[t * experts + rows.of(t)[rank] as usize];
            tokens.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        }
        tokens
    }
}

/// One choice of a token while room is being given out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    Asked(u32),
    Granted(u32),
    Refused(u32),
}

impl Slot {
    fn expert(self) -> Option<u32> {
        match self {
            Self::Granted(expert) => Some(expert),
            Self::Asked(_) | Self::Refused(_) => None,
        }
    }
}

struct Fill {
    room: Vec<usize>,
    rows: Vec<Vec<Slot>>,
    report: CapacityReport,
}

fn taken(rows: ChoiceRows<'_>) -> Vec<Vec<Slot>> {
    (0..rows.tokens()).map(|t| rows.of(t).iter().map(|&e| Slot::Asked(e)).collect()).collect()
}

impl Fill {
    fn keep(&mut self, token: usize, rank: usize) -> bool {
        let slot = &mut self.rows[token][rank];
        let Slot::Asked(expert) = *slot else { return true };
        let room = &mut self.room[expert as usize];
        *slot = if *room > 0 { Slot::Granted(expert) } else { Slot::Refused(expert) };
        *room = room.saturating_sub(1);
        matches!(slot, Slot::Granted(_))
    }

    /// The most probable expert with room that the token has not chosen; ties to the lowest index.
    fn reroute(&mut self, token: usize, rank: usize, p: &[f64]) {
        let row = &mut self.rows[token];
        let free = |e: &usize| self.room[*e] > 0 && !row.contains(&Slot::Granted(*e as u32));
        match (0..p.len()).filter(free).reduce(|best, e| if p[e] > p[best] { e } else { best }) {
            Some(expert) => {
                row[rank] = Slot::Granted(expert as u32);
                self.room[expert] -= 1;
                self.report.rerouted += 1;
            }
            None => self.report.dropped += 1,
        }
    }
}
