//! Measures of a routing against labels, and of loads. Pure.

use std::iter::repeat_n;

/// Counts of `(expert, region)` over tokens, `[E][R]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Confusion {
    experts: usize,
    regions: usize,
    counts: Vec<u64>,
}

impl Confusion {
    /// Counts tokens; an expert or region out of range is not counted.
    pub fn new(experts: usize, regions: usize, pairs: impl Iterator<Item = (usize, usize)>) -> Self {
        let mut counts = vec![0; experts * regions];
        pairs.filter(|(e, r)| *e < experts && *r < regions).for_each(|(e, r)| counts[e * regions + r] += 1);
        Self { experts, regions, counts }
    }

    /// Share of tokens whose expert is the region's, experts matched to regions one to one as well as possible. `None`
    /// without a token, and of more than 16 regions.
    pub fn agreement(&self) -> Option<f64> {
        let total = self.total();
        let matched = |(region, expert): (usize, Option<usize>)| expert.map_or(0, |expert| self.counts[expert * self.regions + region]);
        let agree: u64 = self.matching()?.into_iter().enumerate().map(matched).sum();
        (total > 0).then(|| agree as f64 / total as f64)
    }

    /// The expert of each region under the best matching of one to one, the lowest ones among equals; none of a region
    /// that there is no expert left for. `None` of more than 16 regions.
    ///
    /// Exact, by dynamic programming over the sets of matched regions.
    pub fn matching(&self) -> Option<Vec<Option<usize>>> {
        if self.regions > 16 {
            return None;
        }
        // best[n][s]: most tokens when the first n experts are matched to just the regions in s, or to none.
        let mut best: Vec<Vec<Option<u64>>> = vec![repeat_n(None, 1 << self.regions).collect()];
        best[0][0] = Some(0);
        for row in self.counts.chunks_exact(self.regions.max(1)) {
            let before = &best[best.len() - 1];
            let mut after = before.clone();
            for (set, so_far) in before.iter().enumerate().filter_map(|(set, count)| Some((set, (*count)?))) {
                for (region, count) in row.iter().enumerate().filter(|(region, _)| set >> region & 1 == 0) {
                    let slot = &mut after[set | 1 << region];
                    *slot = Some(slot.map_or(0, |b| b).max(so_far + count));
                }
            }
            best.push(after);
        }
        // The set with most tokens, among equals the largest, so that no region lacks an expert that is free.
        let last = &best[best.len() - 1];
        let most = |set: &usize| (last[*set], set.count_ones());
        let mut set = (0..1_usize << self.regions).max_by_key(most).unwrap_or(0);
        let mut experts = vec![None; self.regions];
        for expert in (0..self.experts).rev().filter(|_| self.regions > 0) {
            let (before, after) = (&best[expert], best[expert + 1][set]);
            if before[set] == after {
                continue;
            }
            let from = |region: &usize| {
                let count = self.counts[expert * self.regions + region];
                set >> region & 1 == 1 && before[set & !(1 << region)].map(|so_far| so_far + count) == after
            };
            if let Some(region) = (0..self.regions).find(from) {
                experts[region] = Some(expert);
                set &= !(1 << region);
            }
        }
        Some(experts)
    }

    /// Mutual information over the mean of the entropies; `None` where both are 0.
    pub fn nmi(&self) -> Option<f64> {
        let total = self.total() as f64;
        let by_expert: Vec<f64> = self.counts.chunks_exact(self.regions).map(|row| row.iter().sum::<u64>() as f64 / total).collect();
        let of_region = |r: usize| self.counts.iter().skip(r).step_by(self.regions).sum::<u64>() as f64 / total;
        let by_region: Vec<f64> = (0..self.regions).map(of_region).collect();
        let information = |i: usize, count: u64| {
            let joint = count as f64 / total;
            if count == 0 { 0.0 } else { joint * (joint / (by_expert[i / self.regions] * by_region[i % self.regions])).ln() }
        };
        let shared: f64 = self.counts.iter().enumerate().map(|(i, count)| information(i, *count)).sum();
        let mean = 0.5 * (entropy(&by_expert) + entropy(&by_region));
        (mean > 0.0).then(|| shared / mean)
    }

    fn total(&self) -> u64 {
        debug_assert_eq!(self.counts.len(), self.experts * self.regions);
        self.counts.iter().sum()
    }
}

/// Entropy of a distribution, nats.
pub fn entropy(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

/// Squared distances of rows and squared lengths, added up: a pooled relative distance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    apart: f64,
    length: f64,
}

impl Distance {
    /// Of `other` from `reference`.
    pub fn of(reference: &[f64], other: &[f64]) -> Self {
        let apart = reference.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum();
        Self { apart, length: reference.iter().map(|a| a * a).sum() }
    }

    /// Of these rows and those.
    pub fn and(self, other: Self) -> Self {
        Self { apart: self.apart + other.apart, length: self.length + other.length }
    }

    /// `‖reference - other‖ / ‖reference‖`; `None` where the reference is 0 or something is not finite.
    pub fn relative(self) -> Option<f64> {
        super::results::finite((self.apart / self.length).sqrt())
    }
}

/// Value at a share of the sorted values, the lower of two neighbours; 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (share * sorted.len().saturating_sub(1) as f64) as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// Middle value, the mean of two where the number is even; `None` of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => sorted.get(middle).copied(),
        _ => Some(0.5 * (sorted[middle - 1] + sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confusion(pairs: &[(usize, usize)]) -> Confusion {
        Confusion::new(3, 3, pairs.iter().copied())
    }

    #[test]
    fn a_permuted_routing_agrees_fully() {
        let pairs = [(0, 2), (1, 0), (2, 1), (2, 1)];
        assert_eq!(confusion(&pairs).agreement(), Some(1.0));
        assert!((confusion(&pairs).nmi().expect("entropies") - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_matching_is_the_best_one_not_the_greedy_one() {
        // Greedy takes (0, 0) with 5 and is left with 0; the best is (0, 1) and (1, 0) with 8.
        let pairs = [vec![(0, 0); 5], vec![(0, 1); 4], vec![(1, 0); 4]].concat();
        assert_eq!(confusion(&pairs).agreement(), Some(8.0 / 13.0));
        assert_eq!(confusion(&pairs).matching(), Some(vec![Some(1), Some(0), Some(2)]));
    }

    #[test]
    fn every_region_has_an_expert_while_there_are_some() {
        assert_eq!(confusion(&[(0, 2), (1, 0), (2, 1)]).matching(), Some(vec![Some(1), Some(2), Some(0)]));
        assert_eq!(confusion(&[(1, 1)]).matching().map(|experts| experts.iter().flatten().count()), Some(3));
        let few = Confusion::new(1, 2, [(0, 0), (0, 1), (0, 1)].into_iter());
        assert_eq!(few.matching(), Some(vec![None, Some(0)]));
    }

    #[test]
    fn one_expert_for_all_knows_nothing() {
        let pairs = [(1, 0), (1, 1), (1, 2)];
        assert_eq!(confusion(&pairs).agreement(), Some(1.0 / 3.0));
        assert_eq!(confusion(&pairs).nmi(), Some(0.0));
        assert_eq!(confusion(&[(1, 1)]).nmi(), None);
        assert_eq!(confusion(&[]).agreement(), None);
    }

    #[test]
    fn quantiles_and_medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(quantile(&(0..=10).map(f64::from).collect::<Vec<_>>(), 0.9), 9.0);
        assert_eq!(Distance::of(&[3.0, 4.0], &[3.0, 9.0]).relative(), Some(1.0));
        assert_eq!(Distance::of(&[3.0], &[3.0]).and(Distance::of(&[4.0], &[9.0])).relative(), Some(1.0));
    }
}
