//! The measures of the fidelity gap, one token at a time, on plain slices. Sums are f64.
//!
//! `reference` is what the checkpoint was trained as, `served` what a client gets. Whoever needs a mean, a quantile or a sum puts the
//! results into [`super::summary`].

use std::cmp::Ordering;

/// Distance of two outputs of a layer for one token: the sums that all measures of it are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OutputGap {
    /// `‖reference - served‖²`.
    pub difference: f64,
    /// `‖reference‖²`.
    pub reference: f64,
    /// `‖served‖²`.
    pub served: f64,
    /// `<reference, served>`.
    pub product: f64,
}

impl OutputGap {
    /// Of two outputs of one width.
    pub fn new<T: Copy + Into<f64>>(reference: &[T], served: &[T]) -> Self {
        let mut gap = Self::default();
        for (&r, &s) in reference.iter().zip(served) {
            let (r, s): (f64, f64) = (r.into(), s.into());
            gap.difference += (r - s) * (r - s);
            gap.reference += r * r;
            gap.served += s * s;
            gap.product += r * s;
        }
        gap
    }

    /// `‖reference - served‖ / ‖reference‖`: 0 where both are 0, infinite where only the reference is.
    pub fn l2_rel(&self) -> f64 {
        ratio(self.difference.sqrt(), self.reference.sqrt())
    }

    /// `1 - cos`, from 0 to 2; 0 where either is 0. Blind to a served output that is merely shorter.
    pub fn cosine_distance(&self) -> f64 {
        let norms = (self.reference * self.served).sqrt();
        if norms > 0.0 { (1.0 - self.product / norms).max(0.0) } else { 0.0 }
    }

    /// `‖served‖ / ‖reference‖`; 1 where both are 0.
    pub fn norm_ratio(&self) -> f64 {
        if self.reference == 0.0 && self.served == 0.0 { 1.0 } else { (self.served / self.reference).sqrt() }
    }

    /// Adds another token: what is then asked is the pooled form, in which long outputs count more.
    pub fn add(&mut self, other: &Self) {
        self.difference += other.difference;
        self.reference += other.reference;
        self.served += other.served;
        self.product += other.product;
    }
}

/// `Σ w_e Y_e` of one token: `rows` are the outputs of its experts, in the order of `weights`.
pub fn mix<'a>(weights: impl IntoIterator<Item = f64>, rows: impl IntoIterator<Item = &'a [f32]>, out: &mut [f64]) {
    out.fill(0.0);
    for (weight, row) in weights.into_iter().zip(rows) {
        out.iter_mut().zip(row).for_each(|(y, &x)| *y += weight * f64::from(x));
    }
}

/// Share of the reference weight that lies outside the `served` experts, from 0 to 1: `1 - Σ_S w_e / Σ w_e`. From the router alone.
pub fn missed_mass<'a>(reference: impl IntoIterator<Item = (&'a u32, &'a f32)>, served: &[u32]) -> f64 {
    let (mut all, mut kept) = (0.0, 0.0);
    for (expert, &weight) in reference {
        all += f64::from(weight);
        kept += if served.contains(expert) { f64::from(weight) } else { 0.0 };
    }
    if all > 0.0 { (1.0 - kept / all).max(0.0) } else { 0.0 }
}

/// Distance of the last chosen from the first refused logit in units of the temperature, `(z_(k) - z_(k+1)) / τ`: below 1 the token lies
/// at a boundary. `None` where all experts are chosen, or none. `order` lists the experts by descending logit, k + 1 of them or more.
pub fn margin(logits: &[f32], order: &[u32], k: usize, temperature: f64) -> Option<f64> {
    let at = |place: usize| order.get(place).and_then(|&expert| logits.get(expert as usize)).map(|&z| f64::from(z));
    Some((at(k.checked_sub(1)?)? - at(k)?) / temperature)
}

/// How two outputs of experts for the same token differ: (`‖a - b‖`, `‖a‖`). The sums of the two over tokens make the disagreement of
/// the experts, the other factor of the gap beside the missed mass.
pub fn disagreement(a: &[f32], b: &[f32]) -> (f64, f64) {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = a.iter().map(|&a| square(f64::from(a))).sum();
    (difference.sqrt(), norm.sqrt())
}

/// Agreement of two routings of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteAgreement {
    /// Experts in both over experts served.
    pub overlap: f64,
    /// The same experts.
    pub exact: bool,
    /// The first expert is the same.
    pub first: bool,
}

impl RouteAgreement {
    /// Of experts by descending weight; of the reference as many as are served. Two tokens without a route agree.
    pub fn new(reference: &[u32], served: &[u32]) -> Self {
        let both = served.iter().filter(|expert| reference.contains(expert)).count();
        let overlap = if served.is_empty() { 1.0 } else { both as f64 / served.len() as f64 };
        Self { overlap, exact: both == served.len() && served.len() == reference.len(), first: reference.first() == served.first() }
    }
}

/// Distance of two rows of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitGap {
    /// `KL(reference ‖ served)` in nats.
    pub kl: f64,
    /// Jensen-Shannon divergence in nats, at most ln 2.
    pub js: f64,
    /// Relative L2 distance of the logits, each row less its mean, which no probability depends on.
    pub logit_l2: f64,
    /// Both have the same likeliest token; the lowest id of equals.
    pub top1_agree: bool,
    /// Share of the five likeliest tokens that are the same.
    pub top5_overlap: f64,
}

/// Two rows of logits over one vocabulary, in memory that is used again.
#[derive(Clone, Debug, Default)]
pub struct LogitCompare {
    reference: Vec<f64>,
    served: Vec<f64>,
}

impl LogitCompare {
    /// The gap between two rows. Where one of them is not finite, `None`.
    pub fn gap(&mut self, reference: &[f32], served: &[f32]) -> Option<LogitGap> {
        if !reference.iter().chain(served).all(|z| z.is_finite()) {
            return None;
        }
        let [p_log, q_log] = [(&mut self.reference, reference), (&mut self.served, served)].map(|(out, row)| {
            log_softmax(row, out);
            &*out
        });
        let (mut kl, mut js) = (0.0, 0.0);
        for (&lp, &lq) in p_log.iter().zip(q_log) {
            let (p, q) = (lp.exp(), lq.exp());
            let middle = (0.5 * (p + q)).max(f64::MIN_POSITIVE).ln();
            kl += p * (lp - lq);
            js += 0.5 * (p * (lp - middle) + q * (lq - middle));
        }
        let (top, served_top) = (top::<5>(reference), top::<5>(served));
        let same = served_top.iter().flatten().filter(|&token| top.contains(&Some(*token))).count();
        Some(LogitGap {
            kl: kl.max(0.0),
            js: js.max(0.0),
            logit_l2: centred(reference, served).l2_rel(),
            top1_agree: top[0] == served_top[0],
            top5_overlap: same as f64 / top.iter().flatten().count().max(1) as f64,
        })
    }
}

/// `KL(reference ‖ served)` of two rows of logits, in nats, for whoever needs nothing else. No number where a logit is none.
pub fn kl(reference: &[f32], served: &[f32]) -> f64 {
    let (p_total, q_total) = (log_sum_exp(reference), log_sum_exp(served));
    let term = |(&r, &s): (&f32, &f32)| {
        let (lp, lq) = (f64::from(r) - p_total, f64::from(s) - q_total);
        lp.exp() * (lp - lq)
    };
    let sum: f64 = reference.iter().zip(served).map(term).sum();
    if sum.is_nan() { sum } else { sum.max(0.0) }
}

/// The id of the largest logit, the lowest of equals; `None` of an empty row.
pub fn likeliest(row: &[f32]) -> Option<u32> {
    top::<1>(row)[0]
}

/// `-ln softmax(row)[token]` in nats.
pub fn nll(row: &[f32], token: u32) -> f64 {
    log_sum_exp(row) - f64::from(row[token as usize])
}

fn centred(reference: &[f32], served: &[f32]) -> OutputGap {
    let less_mean = |row: &[f32]| -> Vec<f64> {
        let mean = row.iter().map(|&z| f64::from(z)).sum::<f64>() / row.len().max(1) as f64;
        row.iter().map(|&z| f64::from(z) - mean).collect()
    };
    OutputGap::new(&less_mean(reference), &less_mean(served))
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&z| (f64::from(z) - max).exp()).sum::<f64>().ln()
}

fn log_softmax(row: &[f32], out: &mut Vec<f64>) {
    let total = log_sum_exp(row);
    out.clear();
    out.extend(row.iter().map(|&z| f64::from(z) - total));
}

/// Ids of the N largest, descending, the lowest id of equals first.
fn top<const N: usize>(row: &[f32]) -> [Option<u32>; N] {
    let mut best: [Option<u32>; N] = [None; N];
    let above = |id: usize, held: Option<u32>| held.is_none_or(|held| row[id].total_cmp(&row[held as usize]) == Ordering::Greater);
    for id in 0..row.len() {
        if N == 0 || !above(id, best[N - 1]) {
            continue;
        }
        let place = (0..N).find(|&place| above(id, best[place])).unwrap_or(N - 1);
        best[place..].rotate_right(1);
        best[place] = Some(id as u32);
    }
    best
}

fn ratio(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}
