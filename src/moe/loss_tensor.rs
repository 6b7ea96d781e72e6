//! Auxiliary losses on router logits. One layer at a time; counts carry no gradient.

use candle_core::{D, Tensor};

use crate::{error::Result, ops};

/// Load-balancing loss of Switch Transformer (Fedus et al. 2021, eq. 4): `E Σ_e f_e P_e`, a scalar.
///
/// `f` is the share of tokens whose largest logit is e, `P` the mean of `softmax(z / temperature)`. 1 when both are
/// even, up to E when one expert takes all.
pub fn switch_balance(logits_te: &Tensor, temperature: f64) -> Result<Tensor> {
    let (t, e) = logits_te.dims2()?;
    let mut share = vec![0f32; e];
    for row in logits_te.detach().to_vec2::<f32>()? {
        let best = (1..e).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        share[best] += 1.0 / t as f32;
    }
    let share = Tensor::from_vec(share, e, logits_te.device())?;
    let mean = ops::softmax(&(logits_te / temperature)?)?.mean(0)?;
    Ok(((mean * share)?.sum_all()? * e as f64)?)
}

/// Router z-loss (ST-MoE, Zoph et al. 2022): `mean_t logsumexp(z_t)²`, a scalar.
pub fn router_z(logits_te: &Tensor) -> Result<Tensor> {
    Ok(logits_te.log_sum_exp(D::Minus1)?.sqr()?.mean_all()?)
}
