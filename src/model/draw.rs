//! What becomes of a row of logits: it is handed out, or the model itself draws the token after it, so that no row leaves its device.
//!
//! [`reference()`] is what a draw is by definition; whatever draws elsewhere is checked against it.

use std::cmp::Ordering;

/// What is wanted of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowChoice {
    /// The row as it is.
    Logits,
    /// One token; the row itself is not needed.
    Token(TokenDraw),
}

/// How to draw one token of a row. Each filter sees the distribution that those before left, scaled to sum to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenDraw {
    /// Divides the logits; finite, from 0. 0: the likeliest token, the lowest id of equals, and nothing below is looked at.
    pub temperature: f32,
    /// Tokens so much less likely than the likeliest are dropped, at this temperature: kept is a logit with
    /// `logit - largest >= temperature · ln(min_p)`. In `[0, 1)`; 0: off.
    pub min_p: f32,
    /// The largest so many are kept, the lower ids of equals. 0: off.
    pub top_k: u32,
    /// The likeliest are kept, of equals the lower ids first, until they have this share of the mass together: one at least. In
    /// `(0, 1]`; 1: off.
    pub top_p: f32,
    /// The random number, in `[0, 1)`: drawn is the first token, in order of ids, with which the mass of what is kept exceeds this share.
    pub uniform: f32,
}

/// What became of a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// It is among [`Forward::logits`](super::Forward::logits).
    Row,
    /// This token was drawn.
    Token(u32),
    /// A token was to be drawn, but not all logits are finite.
    NonFinite,
}

impl TokenDraw {
    /// The likeliest token.
    pub const LIKELIEST: Self = Self { temperature: 0.0, min_p: 0.0, top_k: 0, top_p: 1.0, uniform: 0.0 };
}

/// The token that `draw` takes of `row [V]`, by definition: with a sort, and masses in f64. A row without a value has none that is finite.
///
/// Another order of sums, or f32, may decide otherwise where a sum comes within its rounding of the share that it is compared with.
pub fn reference(row: &[f32], draw: &TokenDraw) -> Drawn {
    if row.is_empty() || row.iter().any(|logit| !logit.is_finite()) {
        return Drawn::NonFinite;
    }
    let mut tokens: Vec<Token> = (0..).zip(row).map(|(id, &logit)| Token { id, logit }).collect();
    tokens.sort_by(Token::rank);
    let likeliest = tokens[0];
    if draw.temperature == 0.0 {
        return Drawn::Token(likeliest.id);
    }
    let mass = |token: &Token| (f64::from(token.logit - likeliest.logit) / f64::from(draw.temperature)).exp();
    if draw.min_p > 0.0 {
        tokens.retain(|token| token.logit - likeliest.logit >= draw.temperature * draw.min_p.ln());
    }
    if draw.top_k > 0 {
        tokens.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let share = f64::from(draw.top_p) * tokens.iter().map(mass).sum::<f64>();
        let mut sum = 0.0;
        let kept = tokens.iter().take_while(|token| (sum < share, sum += mass(token)).0).count();
        tokens.truncate(kept.max(1));
    }
    tokens.sort_by_key(|token| token.id);
    let share = f64::from(draw.uniform) * tokens.iter().map(mass).sum::<f64>();
    let mut sum = 0.0;
    let drawn = tokens.iter().find(|token| (sum += mass(token), sum > share).1);
    Drawn::Token(drawn.unwrap_or(&likeliest).id)
}

#[derive(Clone, Copy)]
struct Token {
    id: u32,
    logit: f32,
}

impl Token {
    /// Larger logits first, of equals the lower id. Logits are finite.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0.1, 0.4, 0.1, 0.4 at temperature 1.
    const ROW: [f32; 4] = [0.0, 1.386_294_4, 0.0, 1.386_294_4];
    const ALL: TokenDraw = TokenDraw { temperature: 1.0, min_p: 0.0, top_k: 0, top_p: 1.0, uniform: 0.0 };

    /// Where in `[0, 1)` each token begins to be drawn, to a thousandth.
    fn drawn(draw: TokenDraw) -> Vec<(u32, u32)> {
        let mut starts: Vec<(u32, u32)> = Vec::new();
        for step in 0..1000 {
            let Drawn::Token(token) = reference(&ROW, &TokenDraw { uniform: step as f32 / 1000.0, ..draw }) else { unreachable!() };
            if starts.last().is_none_or(|last| last.0 != token) {
                starts.push((token, step));
            }
        }
        starts
    }

    #[test]
    fn tokens_share_the_interval_in_order_of_ids() {
        assert_eq!(drawn(ALL), [(0, 0), (1, 100), (2, 500), (3, 600)]);
        assert_eq!(drawn(TokenDraw { temperature: 0.5, ..ALL })[1..], [(1, 30), (2, 500), (3, 530)], "1 to 16");
        assert_eq!(drawn(TokenDraw { min_p: 0.3, ..ALL }), [(1, 0), (3, 500)]);
        assert_eq!(drawn(TokenDraw { min_p: 0.2, ..ALL }).len(), 4);
        assert_eq!(drawn(TokenDraw { top_k: 3, ..ALL }), [(0, 0), (1, 112), (3, 556)], "the lower of equals");
        assert_eq!(drawn(TokenDraw { top_k: 99, ..ALL }).len(), 4);
        assert_eq!(drawn(TokenDraw { top_p: 0.3, ..ALL }), [(1, 0)]);
        assert_eq!(drawn(TokenDraw { top_p: 0.5, ..ALL }), [(1, 0), (3, 500)]);
        assert_eq!(drawn(TokenDraw { top_p: 0.85, ..ALL }), [(0, 0), (1, 112), (3, 556)]);
        assert_eq!(drawn(TokenDraw { top_p: f32::MIN_POSITIVE, ..ALL }), [(1, 0)], "one at least");
        assert_eq!(drawn(TokenDraw { top_k: 2, top_p: 0.45, ..ALL }), [(1, 0)], "a share of what top-k left");
        assert_eq!(drawn(TokenDraw::LIKELIEST), [(1, 0)]);
    }

    #[test]
    fn extremes_draw_a_token_and_what_is_not_finite_none() {
        let highest = 1.0 - f32::EPSILON / 2.0;
        for row in [&[f32::MAX, f32::MIN, 0.0][..], &[f32::MIN; 3], &[1e30, 1e30, -3.0], &[-0.0, 0.0, -0.0], &[7.0]] {
            for temperature in [0.0, f32::MIN_POSITIVE, 1e-6, 1.0, f32::MAX] {
                for (min_p, top_k, top_p) in [(0.0, 0, 1.0), (0.999_999_9, 2, f32::MIN_POSITIVE), (f32::MIN_POSITIVE, u32::MAX, 0.999)] {
                    for uniform in [0.0, 0.5, highest] {
                        let draw = TokenDraw { temperature, min_p, top_k, top_p, uniform };
                        assert!(matches!(reference(row, &draw), Drawn::Token(token) if (token as usize) < row.len()), "{row:?} {draw:?}");
                    }
                }
            }
        }
        assert_eq!(reference(&[-0.0, 0.0], &TokenDraw::LIKELIEST), Drawn::Token(0), "there is one zero only");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for draw in [ALL, TokenDraw::LIKELIEST] {
                assert_eq!(reference(&[1.0, bad, 0.0], &draw), Drawn::NonFinite);
            }
        }
        assert_eq!(reference(&[], &ALL), Drawn::NonFinite);
    }
}
