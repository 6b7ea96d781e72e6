//! Loss-free balancing: a bias on the selection score of each expert, moved against its load (Wang et al. 2024,
//! arXiv:2408.15664; DeepSeek-V3). It takes part in the choice and in nothing else: no weight, no gradient, no statistic.

/// `b_e += rate · sign(mean n - n_e)`, once for each global batch. `counts [E]` are rows before capacity.
pub fn update(bias: &mut [f64], counts: &[u64], rate: f64) {
    let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
    for (b, &n) in bias.iter_mut().zip(counts) {
        let gap = mean - n as f64;
        if gap != 0.0 {
            *b += rate * gap.signum();
        }
    }
}
