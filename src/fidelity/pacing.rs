//! When work that nobody waits for may run beside requests: how large its pieces are, and what it has earned. Pure: whoever runs it tells
//! how long things took.

use std::time::Duration;

/// How long a piece of work should take: a request that comes meanwhile waits for it.
pub const PIECE: Duration = Duration::from_millis(20);

/// Tokens of a piece. A model reads its weights for each piece anew, so very small ones would cost more than they spare.
const TOKENS: (usize, usize) = (8, 128);

/// Tokens of the first piece, of which nothing is known.
const FIRST_TOKENS: usize = 16;

/// Credit is saved for so long.
const SAVED: Duration = Duration::from_secs(10);

/// A share of the time in which requests are worked on: it is earned while they are, and spent in pieces.
#[derive(Clone, Debug, PartialEq)]
pub struct Credit {
    share: f64,
    /// Seconds. Below 0 after a piece that took longer than it was thought to.
    balance: f64,
}

/// The size of the next piece, by how long the last ones took.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceSize {
    tokens: usize,
    /// Seconds that such a piece is thought to take.
    cost: f64,
}

impl Credit {
    /// None yet. `share` of the time, from 0.
    pub fn new(share: f64) -> Self {
        Self { share, balance: 0.0 }
    }

    /// Requests were worked on for so long. A piece costs `cost`: credit is saved for one at least.
    pub fn earn(&mut self, worked: Duration, cost: Duration) {
        let most = (self.share * SAVED.as_secs_f64()).max(cost.as_secs_f64());
        if self.share > 0.0 && self.balance < most {
            self.balance = (self.balance + self.share * worked.as_secs_f64()).min(most);
        }
    }

    /// Whether a piece can be paid for.
    pub fn affords(&self, cost: Duration) -> bool {
        self.share > 0.0 && self.balance >= cost.as_secs_f64()
    }

    /// A piece took so long.
    pub fn spend(&mut self, spent: Duration) {
        self.balance -= spent.as_secs_f64();
    }
}

impl Default for PieceSize {
    fn default() -> Self {
        Self { tokens: FIRST_TOKENS, cost: PIECE.as_secs_f64() }
    }
}

impl PieceSize {
    /// Tokens of the next piece, in each routing.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How long it is thought to take.
    pub fn cost(&self) -> Duration {
        Duration::from_secs_f64(self.cost)
    }

    /// A piece of `tokens` tokens took so long. One that was the rest of a text says nothing of larger ones.
    pub fn ran(&mut self, tokens: usize, took: Duration) {
        let (took, target) = (took.as_secs_f64(), PIECE.as_secs_f64());
        if tokens < self.tokens {
            self.cost = self.cost.max(took);
            return;
        }
        let (least, most) = TOKENS;
        // Half of what was known: a piece that the machine took long over for other reasons does not keep the next ones away.
        self.cost = 0.5 * (self.cost + took);
        if took > target && self.tokens > least {
            // Not halved with the tokens: weights are read all the same.
            self.tokens = (self.tokens / 2).max(least);
        } else if took < target / 3.0 && self.tokens < most {
            self.tokens = (self.tokens * 2).min(most);
            self.cost *= 2.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn no_more_is_spent_than_the_share() {
        for share in [0.01, 0.1, 0.5] {
            let (mut credit, mut worked, mut spent) = (Credit::new(share), 0.0, 0.0);
            for step in 0..100_000_u64 {
                let took = ms(1 + step % 7);
                credit.earn(took, ms(15));
                worked += took.as_secs_f64();
                if credit.affords(ms(15)) {
                    // Some take longer than they were thought to: that is paid back.
                    let piece = ms(15 + step % 11);
                    credit.spend(piece);
                    spent += piece.as_secs_f64();
                }
            }
            assert!((spent / worked - share).abs() < 0.02 * share, "{share}: {}", spent / worked);
        }
    }

    #[test]
    fn credit_is_not_hoarded_and_suffices_for_one_piece() {
        let mut credit = Credit::new(0.01);
        credit.earn(Duration::from_secs(3600), ms(20));
        assert!(credit.affords(ms(100)) && !credit.affords(ms(101)));
        let mut slow = Credit::new(0.01);
        (0..1000).for_each(|_| slow.earn(Duration::from_secs(1), Duration::from_secs(2)));
        assert!(slow.affords(Duration::from_secs(2)), "a piece that takes longer than what is saved for");
        let mut none = Credit::new(0.0);
        none.earn(Duration::from_secs(3600), ms(1));
        assert!(!none.affords(Duration::ZERO));
    }

    #[test]
    fn pieces_find_their_size() {
        let size_at = |fixed: f64, per_token: f64| {
            let mut size = PieceSize::default();
            let mut took = Duration::ZERO;
            for _ in 0..20 {
                took = Duration::from_secs_f64(fixed + per_token * size.tokens() as f64);
                size.ran(size.tokens(), took);
            }
            assert!(size.cost() >= took.mul_f64(0.5), "a cost is not thought too low by far");
            size.tokens()
        };
        assert_eq!(size_at(0.0, 1e-6), 128);
        assert_eq!(size_at(0.5, 1e-3), 8, "no smaller: it would not be much faster");
        assert!((16..=32).contains(&size_at(0.0, 6e-4)));
    }

    #[test]
    fn the_rest_of_a_text_does_not_make_pieces_larger() {
        let mut size = PieceSize::default();
        size.ran(16, ms(10));
        size.ran(1, ms(1));
        assert_eq!((size.tokens(), size.cost()), (16, ms(15)), "between what was thought and what was seen");
    }
}
