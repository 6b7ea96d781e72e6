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

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(factor: f64, overflow: Overflow, order: Order) -> Capacity {
        Capacity { factor, overflow, order }
    }

    /// Applies to rows of choices; gives the rows after it.
    fn apply(capacity: Capacity, rows: &[&[u32]], p: &[f64], k: usize) -> (Vec<Vec<u32>>, CapacityReport) {
        let mut choices = Choices::from_rows(rows);
        let report = capacity.apply(&mut choices, p, p.len() / rows.len(), k);
        ((0..rows.len()).map(|t| choices.rows().of(t).to_vec()).collect(), report)
    }

    #[test]
    fn rows_of_an_expert() {
        let rows = |factor, tokens, k, experts| capacity(factor, Overflow::Drop, Order::Position).rows(tokens, k, experts);
        assert_eq!((rows(1.0, 8, 1, 4), rows(1.25, 8, 1, 4), rows(1.0, 9, 2, 4), rows(0.1, 4, 1, 8)), (2, 3, 5, 1));
    }

    /// Four tokens want expert 0, with growing probability; the second best is 1, then 2, then 3.
    const P: [f64; 16] = [0.4, 0.3, 0.2, 0.1, 0.5, 0.3, 0.1, 0.1, 0.6, 0.2, 0.1, 0.1, 0.7, 0.2, 0.1, 0.0];

    #[test]
    fn overflow_is_dropped_or_rerouted() {
        let wants: [&[u32]; 4] = [&[0], &[0], &[0], &[0]];
        let (rows, report) = apply(capacity(2.0, Overflow::Drop, Order::Position), &wants, &P, 1);
        assert_eq!((rows, report), (vec![vec![0], vec![0], vec![], vec![]], CapacityReport { dropped: 2, rerouted: 0 }));
        let (rows, report) = apply(capacity(2.0, Overflow::Drop, Order::Probability), &wants, &P, 1);
        assert_eq!((rows, report.dropped), (vec![vec![], vec![], vec![0], vec![0]], 2));
        let (rows, report) = apply(capacity(1.0, Overflow::Reroute, Order::Position), &wants, &P, 1);
        assert_eq!((rows, report), (vec![vec![0], vec![1], vec![2], vec![3]], CapacityReport { dropped: 0, rerouted: 3 }));
    }

    #[test]
    fn first_choices_come_before_second_ones() {
        // Token 0 wants 1 only second: token 1, whose first choice it is, has it.
        let (rows, report) = apply(capacity(0.5, Overflow::Drop, Order::Position), &[&[0, 1], &[1, 0]], &[0.6, 0.4, 0.4, 0.6], 2);
        assert_eq!((rows, report.dropped), (vec![vec![0], vec![1]], 2));
    }

    #[test]
    fn rerouting_never_gives_a_token_the_same_expert_twice() {
        let wants: [&[u32]; 4] = [&[0, 1], &[0, 1], &[0, 1], &[0, 1]];
        let (rows, report) = apply(capacity(1.0, Overflow::Reroute, Order::Position), &wants, &P, 2);
        assert!(rows.iter().all(|row| row.len() == 2 && row[0] != row[1]), "{rows:?}");
        assert_eq!(report, CapacityReport { dropped: 0, rerouted: 4 });
        let counts = Choices::from_rows(&rows).rows().counts(0..4, 4);
        assert_eq!(counts, [2.0; 4], "as full as can be");
        // With two experts and room for one each, the second token's choices find no other expert.
        let (rows, report) = apply(capacity(0.5, Overflow::Reroute, Order::Position), &[&[0, 1], &[0, 1]], &[0.6, 0.4, 0.6, 0.4], 2);
        assert_eq!((rows, report.dropped), (vec![vec![0, 1], vec![]], 2));
    }

    #[test]
    fn room_for_all_changes_nothing() {
        let wants: [&[u32]; 4] = [&[0, 2], &[3], &[], &[1, 0]];
        for order in [Order::Position, Order::Probability] {
            let (rows, report) = apply(capacity(4.0, Overflow::Reroute, order), &wants, &P, 2);
            assert_eq!((rows, report), (wants.map(<[u32]>::to_vec).to_vec(), CapacityReport::default()));
        }
    }

    #[test]
    fn a_factor_of_zero_is_refused() {
        for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = capacity(factor, Overflow::Drop, Order::Position).check("routing.capacity").unwrap_err().to_string();
            assert_eq!(error, "routing.capacity.factor: must be above 0");
        }
    }
}
