use std::cmp::Ordering;

use crate::sample::{Choice, NON_FINITE};

/// The tokens that are right for `choice` of a row, ascending. That is one, but where a sum comes within `slack`, a share of all mass, of what it is compared
/// with: there rounding decides, and what lies on both sides is right. Masses are summed in f64, in the order in which a sort puts the tokens.
pub fn sample(row: &[f32], choice: &Choice, slack: f64) -> Vec<u32> {
    if row.iter().any(|logit| !logit.is_finite()) {
        return vec![NON_FINITE];
    }
    let mut tokens: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    let largest = tokens[0];
    if choice.temperature < 1e-6 || choice.top_k == 1 {
        return vec![largest.0];
    }
    if choice.min_p > 0.0 {
        tokens.retain(|token| token.1 - largest.1 >= choice.temperature * choice.min_p.ln());
    }
    if choice.top_k > 0 {
        tokens.truncate(choice.top_k as usize);
    }
    let masses: Vec<f64> = tokens.iter().map(|token| (f64::from(token.1 - largest.1) / f64::from(choice.temperature)).exp()).collect();
    let all: f64 = masses.iter().sum();
    let kept = |share: f64| {
        let mut sum = 0.0;
        masses.iter().take_while(|mass| (sum < share * all, sum += *mass).0).count().max(1)
    };
    let top_p = f64::from(choice.top_p);
    let kept = if top_p < 1.0 { kept(top_p - slack)..=kept(top_p + slack) } else { tokens.len()..=tokens.len() };
    let mut right: Vec<u32> = kept.flat_map(|kept| drawn(&tokens[..kept], &masses[..kept], f64::from(choice.uniform), slack)).collect();
    right.sort_unstable();
    right.dedup();
    right
}

/// The tokens about the place, in order of ids, where the mass exceeds the share `uniform`.
fn drawn(tokens: &[(u32, f32)], masses: &[f64], uniform: f64, slack: f64) -> Vec<u32> {
    let mut by_id: Vec<(u32, f64)> = tokens.iter().zip(masses).map(|(token, &mass)| (token.0, mass)).collect();
    by_id.sort_by_key(|token| token.0);
    let all: f64 = masses.iter().sum();
    let (from, to) = ((uniform - slack).max(0.0) * all, (uniform + slack) * all);
    let mut sum = 0.0;
    let about = by_id.iter().filter(|token| {
        let before = sum;
        sum += token.1;
        sum > from && before <= to
    });
    about.map(|token| token.0).collect()
}
