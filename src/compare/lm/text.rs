//! Bytes of four domains, in windows of one domain each.

use std::ops::Range;

use crate::compare::{
    data::{CODE, PROSE, RECORDS},
    random::Random,
};

/// Bytes of a window.
pub(super) const LENGTH: usize = 64;
/// Domains.
pub(super) const DOMAINS: usize = DOMAIN_NAMES.len();
/// Prose, source code, records of numbers, arithmetic; as the report has them.
pub(super) const DOMAIN_NAMES: [&str; 4] = ["prose", "code", "records", "arithmetic"];
/// Values of a byte.
pub(super) const VOCABULARY: usize = 256;
/// Bytes of arithmetic, as many as the other domains have about.
const ARITHMETIC: usize = 100_000;
/// One byte in so many, at the end of each domain, is for tests.
const HELD_OUT: usize = 8;

/// Training and test text of every domain.
#[derive(Debug)]
pub(super) struct Corpus {
    domains: [Vec<u8>; DOMAINS],
}

/// Windows, one after the other.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows {
    /// `[T]`.
    pub(super) inputs: Vec<u32>,
    /// `[T]`, the byte after each.
    pub(super) targets: Vec<u32>,
    /// `[T]`.
    pub(super) domains: Vec<u32>,
}

impl Corpus {
    /// The text is the same for every seed.
    pub(super) fn new() -> Self {
        Self { domains: [PROSE.to_vec(), CODE.to_vec(), RECORDS.to_vec(), arithmetic()] }
    }

    fn part(&self, domain: usize, test: bool) -> &[u8] {
        let text = &self.domains[domain];
        let (train, held_out) = text.split_at(text.len() - text.len() / HELD_OUT);
        if test { held_out } else { train }
    }

    /// The windows of a step: domains in turn, places at random.
    pub(super) fn batch(&self, seed: u64, step: usize, count: usize) -> Windows {
        let mut random = Random::of_step(seed, "text", step);
        let mut windows = Windows::default();
        for number in 0..count {
            let text = self.part(number % DOMAINS, false);
            let start = random.below(text.len() - LENGTH);
            windows.push(text, start, number % DOMAINS);
        }
        windows
    }

    /// Windows of the test text, the same for every seed: domains in turn, places spread evenly.
    pub(super) fn test(&self, count: usize) -> Windows {
        let mut windows = Windows::default();
        for number in 0..count {
            let text = self.part(number % DOMAINS, true);
            let (place, places) = (number / DOMAINS, count.div_ceil(DOMAINS));
            windows.push(text, place * (text.len() - LENGTH - 1) / places, number % DOMAINS);
        }
        windows
    }

    /// Loss on `windows` of always predicting bytes as often as the training text has them, nats per byte.
    pub(super) fn trivial(&self, windows: &Windows) -> f64 {
        let mut counts = [1.0; VOCABULARY];
        let train = (0..DOMAINS).flat_map(|domain| self.part(domain, false));
        train.for_each(|&byte| counts[usize::from(byte)] += 1.0);
        let all: f64 = counts.iter().sum();
        let losses = windows.targets.iter().map(|&byte| -(counts[byte as usize % VOCABULARY] / all).ln());
        losses.sum::<f64>() / windows.targets.len().max(1) as f64
    }
}

impl Windows {
    fn push(&mut self, text: &[u8], start: usize, domain: usize) {
        let window = &text[start..start + LENGTH + 1];
        self.inputs.extend(window[..LENGTH].iter().map(|&byte| u32::from(byte)));
        self.targets.extend(window[1..].iter().map(|&byte| u32::from(byte)));
        self.domains.extend([domain as u32; LENGTH]);
    }

    /// Some of the windows.
    pub(super) fn part(&self, windows: Range<usize>) -> Self {
        let count = self.inputs.len() / LENGTH;
        let tokens = windows.start.min(count) * LENGTH..windows.end.min(count) * LENGTH;
        let of = |all: &[u32]| all[tokens.clone()].to_vec();
        Self { inputs: of(&self.inputs), targets: of(&self.targets), domains: of(&self.domains) }
    }
}

/// Lines such as `37+48=85`.
fn arithmetic() -> Vec<u8> {
    let mut random = Random::new(0, "arithmetic");
    let mut text = String::with_capacity(ARITHMETIC + 16);
    while text.len() < ARITHMETIC {
        let (a, b) = (random.below(1000), random.below(1000));
        let line = match random.below(3) {
            0 => format!("{a}+{b}={}\n", a + b),
            1 => format!("{}-{}={}\n", a.max(b), a.min(b), a.abs_diff(b)),
            _ => format!("{}*{}={}\n", a % 20, b % 20, a % 20 * (b % 20)),
        };
        text.push_str(&line);
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_of_one_domain_and_targets_are_one_ahead() {
        let corpus = Corpus::new();
        for windows in [corpus.batch(3, 5, 8), corpus.test(12)] {
            for (i, (inputs, domains)) in windows.inputs.chunks(LENGTH).zip(windows.domains.chunks(LENGTH)).enumerate() {
                assert!(domains.iter().all(|&domain| domain as usize == i % DOMAINS));
                assert_eq!(inputs[1..], windows.targets[i * LENGTH..(i + 1) * LENGTH - 1]);
            }
        }
        assert_eq!(corpus.batch(3, 5, 8).inputs, corpus.batch(3, 5, 8).inputs);
        assert_ne!(corpus.batch(3, 5, 8).inputs, corpus.batch(3, 6, 8).inputs);
        assert_ne!(corpus.batch(3, 5, 8).inputs, corpus.batch(4, 5, 8).inputs);
    }

    #[test]
    fn what_is_tested_is_not_trained_on() {
        let corpus = Corpus::new();
        for domain in 0..DOMAINS {
            let (train, test) = (corpus.part(domain, false), corpus.part(domain, true));
            assert_eq!([train, test].concat(), corpus.domains[domain]);
            assert!(test.len() > 10_000, "{}", test.len());
        }
        let trivial = corpus.trivial(&corpus.test(64));
        assert!(trivial > 2.0 && trivial < 256f64.ln(), "{trivial}");
        let line = arithmetic().split(|&byte| byte == b'\n').next().map(<[u8]>::to_vec).unwrap();
        assert!(String::from_utf8(line).unwrap().contains('='));
    }
}
