//! What is asked of a whole row of logits, in loops over short runs that the compiler turns into vector instructions.

use crate::error::{Error, Result};

/// Values of a run: what the loops below take at once, and what may be skipped at once.
pub(super) const RUN: usize = 64;

/// Values side by side in a loop.
const LANES: usize = 16;

/// The largest value of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Peak {
    /// The lowest index that has it.
    pub(super) index: usize,
    /// Negative infinity for an empty row, or one where nothing is left.
    pub(super) value: f32,
}

/// The largest value of a row that the model made. Fails with [`Error::NonFinite`] if not all values are finite.
pub(super) fn finite_peak(row: &[f32]) -> Result<Peak> {
    let (peak, finite) = scan(row, |_| ());
    if finite { Ok(peak) } else { Err(Error::NonFinite) }
}

/// The largest value of a row, in which negative infinity marks what may not be drawn.
pub(super) fn peak(row: &[f32]) -> Peak {
    scan(row, |_| ()).0
}

/// The largest value of the row and of each of its runs of [`RUN`], and whether all values are finite.
pub(super) fn maxima(row: &[f32]) -> (Peak, Vec<f32>, bool) {
    let mut maxima = Vec::with_capacity(row.len().div_ceil(RUN));
    let (peak, finite) = scan(row, |max| maxima.push(max));
    (peak, maxima, finite)
}

fn scan(row: &[f32], mut each: impl FnMut(f32)) -> (Peak, bool) {
    let (mut best, mut best_run, mut finite) = (f32::NEG_INFINITY, 0, true);
    for (run, values) in row.chunks(RUN).enumerate() {
        let (max, run_finite) = summary(values);
        finite &= run_finite;
        if max > best {
            (best, best_run) = (max, run);
        }
        each(max);
    }
    let start = best_run * RUN;
    let within = row.get(start..).and_then(|rest| rest.iter().position(|&value| value == best)).unwrap_or(0);
    (Peak { index: start + within, value: best }, finite)
}

/// Largest value of a run, and whether all are finite.
fn summary(run: &[f32]) -> (f32, bool) {
    let (mut max, mut zero) = ([f32::NEG_INFINITY; LANES], [0f32; LANES]);
    let (groups, rest) = run.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            max[lane] = if group[lane] > max[lane] { group[lane] } else { max[lane] };
            // Stays zero unless the value is infinite or not a number.
            zero[lane] += group[lane] * 0.0;
        }
    }
    let (mut largest, mut sum) = (f32::NEG_INFINITY, zero.iter().sum::<f32>());
    for &value in max.iter().chain(rest) {
        largest = if value > largest { value } else { largest };
    }
    for &value in rest {
        sum += value * 0.0;
    }
    (largest, sum == 0.0)
}

/// `Σ e^((value - max) · scale)`, where `max` is at least every value.
pub(super) fn mass(values: &[f32], max: f32, scale: f32) -> f64 {
    let mut total = 0.0;
    for run in values.chunks(RUN) {
        let mut lanes = [0f32; LANES];
        let (groups, rest) = run.as_chunks::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                lanes[lane] += exp((group[lane] - max) * scale);
            }
        }
        for (lane, &value) in lanes.iter_mut().zip(rest) {
            *lane += exp((value - max) * scale);
        }
        total += f64::from(lanes.iter().sum::<f32>());
    }
    total
}

/// `e^x` for `x` up to 0, within 2e-7 of it; 0 where it is below 1e-37. Without a branch or a call, so that loops over it vectorise.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LEAST: f32 = -85.0;
    // Adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let bounded = if x < LEAST { LEAST } else { x };
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    // Taylor up to r^7 on |r| <= ln(2)/2.
    let mut y = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + coefficient;
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x < LEAST { 0.0 } else { y * power }
}

/// The mass of a row by distance from its largest value: where a share of it is reached is known without a sort.
pub(super) struct Histogram {
    max: f32,
    scale: f32,
    bins_per_nat: f32,
    /// The last is for all that is further away than the range.
    masses: [f64; BINS + 1],
}

/// Bins within the range of a [`Histogram`].
const BINS: usize = 1024;

impl Histogram {
    /// Of `e^((value - max) · scale)`, with a `range` of the exponent in bins of equal width.
    pub(super) fn new(values: &[f32], max: f32, scale: f32, range: f32) -> Self {
        let mut histogram = Self { max, scale, bins_per_nat: BINS as f32 / range, masses: [0.0; BINS + 1] };
        let (mut weights, mut bins) = ([0f32; RUN], [0u32; RUN]);
        for run in values.chunks(RUN) {
            for ((weight, bin), &value) in weights.iter_mut().zip(&mut bins).zip(run) {
                *weight = exp((value - max) * scale);
                *bin = histogram.bin(value);
            }
            for (&weight, &bin) in weights.iter().zip(&bins).take(run.len()) {
                if let Some(mass) = histogram.masses.get_mut(bin as usize) {
                    *mass += f64::from(weight);
                }
            }
        }
        histogram
    }

    /// The bin of a value; a larger value has no larger bin.
    #[inline(always)]
    pub(super) fn bin(&self, value: f32) -> u32 {
        // Adding it rounds to an integer, which is then in the low bits.
        const ROUND: f32 = 8_388_608.0;
        let place = (self.max - value) * self.scale * self.bins_per_nat;
        let bounded = if place < BINS as f32 { place } else { BINS as f32 };
        (bounded + ROUND).to_bits() & (ROUND as u32 - 1)
    }

    /// The bin in which the mass reaches `target`, and the mass before it.
    pub(super) fn crossing(&self, target: f64) -> (u32, f64) {
        let mut before = 0.0;
        for (bin, &mass) in (0..).zip(&self.masses) {
            if before + mass >= target {
                return (bin, before);
            }
            before += mass;
        }
        (BINS as u32, before)
    }
}

/// A value and its index as one number that sorts by value, and among equal values puts the lower index higher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(index: u32, value: f32) -> Self {
        // All bits of negative numbers are turned, of the others the sign: then bits sort as their values do. There is one zero only.
        let bits = (value + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Self(u64::from(ordered) << 32 | u64::from(!index))
    }

    pub(super) fn index(self) -> u32 {
        !(self.0 as u32)
    }

    pub(super) fn value(self) -> f32 {
        let ordered = (self.0 >> 32) as u32;
        f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
    }
}

/// Puts the `n` largest first, in no order; `n` is below the number of keys.
pub(super) fn select(keys: &mut [Key], n: usize) {
    keys.select_nth_unstable_by(n, |a, b| b.cmp(a));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_the_lowest_of_equals() {
        for len in [1, 15, 16, 17, 63, 64, 65, 1000] {
            for at in [0, len / 2, len - 1] {
                let mut row = vec![-3.0; len];
                row[at..].fill(2.0);
                assert_eq!(finite_peak(&row).unwrap(), Peak { index: at, value: 2.0 });
                let (found, maxima, finite) = maxima(&row);
                assert!(finite && found.index == at && maxima.len() == len.div_ceil(RUN) && maxima[at / RUN] == 2.0);
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    row[at] = bad;
                    assert!(matches!(finite_peak(&row), Err(Error::NonFinite)), "{bad} at {at} of {len}");
                }
            }
        }
        assert_eq!(peak(&[f32::NEG_INFINITY; 3]).value, f32::NEG_INFINITY);
        assert_eq!(peak(&[]).value, f32::NEG_INFINITY);
    }

    #[test]
    fn exp_is_exp() {
        for step in 0..200_000 {
            let x = -(step as f32) * 4e-4;
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() < 2e-7, "e^{x}: {found} instead of {expected}");
        }
        assert_eq!((exp(0.0), exp(-0.0), exp(-86.0), exp(f32::NEG_INFINITY), exp(f32::MIN)), (1.0, 1.0, 0.0, 0.0, 0.0));
    }

    #[test]
    fn masses_add_up() {
        for len in [1, 16, 17, 100, 5000] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 / 10.0 - 12.0).collect();
            let max = peak(&row).value;
            let expected: f64 = row.iter().map(|&value| (f64::from(value - max) * 0.5).exp()).sum();
            assert!((mass(&row, max, 0.5) / expected - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn a_histogram_holds_all_mass_in_order() {
        let row: Vec<f32> = (0..5000).map(|i| ((i * 37) % 1013) as f32 / 25.0).collect();
        let max = peak(&row).value;
        let histogram = Histogram::new(&row, max, 0.7, 14.0);
        let total = mass(&row, max, 0.7);
        assert!((histogram.masses.iter().sum::<f64>() / total - 1.0).abs() < 1e-6);
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        assert!(sorted.windows(2).all(|pair| histogram.bin(pair[0]) <= histogram.bin(pair[1])));
        assert_eq!((histogram.bin(max), histogram.bin(-1e9), histogram.bin(f32::NEG_INFINITY)), (0, 1024, 1024));
        for share in [0.001, 0.5, 0.9, 0.999, 1.0] {
            let target = share * total * 0.999_999;
            let (bin, before) = histogram.crossing(target);
            let mass_of = |keep: &dyn Fn(u32) -> bool| {
                let kept = row.iter().filter(|&&value| keep(histogram.bin(value)));
                kept.map(|&value| f64::from(exp((value - max) * 0.7))).sum::<f64>()
            };
            assert!((mass_of(&|b| b < bin) - before).abs() < 1e-6);
            assert!(before < target && mass_of(&|b| b <= bin) >= target * (1.0 - 1e-9));
        }
    }

    #[test]
    fn keys_sort_like_their_values() {
        let values = [f32::NEG_INFINITY, f32::MIN, -1.5, -1e-40, 0.0, 1e-40, 2.0, f32::MAX];
        let keys: Vec<Key> = values.iter().map(|&value| Key::new(7, value)).collect();
        assert!(keys.is_sorted() && keys.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(keys.iter().zip(values).all(|(key, value)| (key.index(), key.value()) == (7, value)));
        assert_eq!(Key::new(3, -0.0), Key::new(3, 0.0));
        assert!(Key::new(0, 1.0) > Key::new(1, 1.0) && Key::new(u32::MAX, 1.0) > Key::new(0, 0.5));
    }
}
