//! When work that nobody waits for may run beside requests: how large its pieces are, and what it has earned. Pure: whoever runs it tells
//! how long things took.

use std::time::Duration;

/// How long a piece of work should take: a request that comes meanwhile waits for it.
pub const PIECE: Duration = Duration::from_millis(20);

/// Rows of the smallest piece, over all of its routings. A model reads its weights for each piece anew, so smaller ones would cost more
/// than they spare. It is the first as well: nothing is known of what it will take.
const LEAST_ROWS: usize = 8;

/// Tokens of the largest piece.
const MOST_TOKENS: usize = 128;

/// Credit is saved for so long where nothing else is said.
const SAVED: Duration = Duration::from_secs(10);

/// A share of the time in which requests are worked on: it is earned while they are, and spent in pieces.
#[derive(Clone, Debug, PartialEq)]
pub struct Credit {
    share: f64,
    /// Seconds for which it is saved.
    saved: f64,
    /// Seconds. Below 0 after a piece that took longer than it was thought to.
    balance: f64,
}

/// The size of the next piece, by how long the last ones took.
#[derive(Clone, Debug, PartialEq)]
pub struct PieceSize {
    /// Side by side.
    routings: usize,
    tokens: usize,
    /// Seconds that such a piece is thought to take.
    cost: f64,
}

impl Credit {
    /// None yet. `share` of the time, from 0.
    pub fn new(share: f64) -> Self {
        Self::saving(share, SAVED)
    }

    /// The same, saved for `saved` at most: so much of the time may go to pieces that follow one another.
    pub fn saving(share: f64, saved: Duration) -> Self {
        Self { share, saved: saved.as_secs_f64(), balance: 0.0 }
    }

    /// Requests were worked on for so long. A piece costs `cost`: credit is saved for one at least.
    pub fn earn(&mut self, worked: Duration, cost: Duration) {
        let most = (self.share * self.saved).max(cost.as_secs_f64());
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

impl PieceSize {
    /// Nothing is known of pieces in so many routings.
    pub fn new(routings: usize) -> Self {
        Self { routings, tokens: least(routings), cost: PIECE.as_secs_f64() }
    }

    /// As given.
    pub fn routings(&self) -> usize {
        self.routings
    }

    /// Tokens of the next piece, in each routing.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How long it is thought to take.
    pub fn cost(&self) -> Duration {
        Duration::from_secs_f64(self.cost)
    }

    /// A piece of `tokens` tokens took so long.
    pub fn ran(&mut self, tokens: usize, took: Duration) {
        let (took, target) = (took.as_secs_f64(), PIECE.as_secs_f64());
        // The rest of a text is smaller: a whole piece takes at least as long, and at most so much longer as it has more tokens.
        let longest = took * (self.tokens as f64 / tokens.max(1) as f64).max(1.0);
        // Half of what was known: a piece that the machine took long over for other reasons does not keep the next ones away.
        self.cost = 0.5 * (self.cost + self.cost.clamp(took, longest));
        if tokens < self.tokens {
            return;
        }
        let least = least(self.routings);
        if took > target && self.tokens > least {
            // The cost is not halved with the tokens: weights are read all the same.
            self.tokens = (self.tokens / 2).max(least);
        } else if took < target / 3.0 && self.tokens < MOST_TOKENS {
            self.tokens = (self.tokens * 2).min(MOST_TOKENS);
            self.cost *= 2.0;
        }
    }
}

/// Tokens of the smallest piece in so many routings.
fn least(routings: usize) -> usize {
    (LEAST_ROWS / routings.max(1)).max(1)
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
        let mut brief = Credit::saving(0.5, Duration::from_secs(1));
        brief.earn(Duration::from_secs(3600), ms(20));
        assert!(brief.affords(ms(500)) && !brief.affords(ms(501)));
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
            let mut size = PieceSize::new(1);
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
    fn a_piece_has_fewer_tokens_where_it_has_more_routings() {
        for (routings, first) in [(1, 8), (2, 4), (3, 2), (9, 1)] {
            let mut size = PieceSize::new(routings);
            assert_eq!(size.tokens(), first, "nobody knows how long the first one will take");
            (0..5).for_each(|_| size.ran(size.tokens(), ms(1000)));
            assert_eq!(size.tokens(), first, "no smaller");
            (0..9).for_each(|_| size.ran(size.tokens(), ms(1)));
            assert_eq!(size.tokens(), MOST_TOKENS);
        }
    }

    #[test]
    fn the_rest_of_a_text_does_not_make_pieces_larger() {
        let mut size = PieceSize::new(1);
        size.ran(8, ms(10));
        size.ran(1, ms(2));
        assert_eq!((size.tokens(), size.cost()), (8, ms(15)), "between what was thought and what was seen");
    }

    #[test]
    fn one_slow_piece_does_not_stop_short_texts_from_being_measured() {
        let mut size = PieceSize::new(1);
        (0..9).for_each(|_| size.ran(size.tokens(), ms(1)));
        assert_eq!(size.tokens(), 128);
        // Texts of 100 tokens: none of their pieces is a whole one.
        size.ran(100, Duration::from_secs(3));
        assert!(size.cost() > Duration::from_secs(1), "it may have been no accident");
        (0..12).for_each(|_| size.ran(100, ms(10)));
        assert!((ms(10)..ms(15)).contains(&size.cost()), "{:?}", size.cost());
    }
}
