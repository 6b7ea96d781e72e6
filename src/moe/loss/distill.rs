//! A soft teacher to a hard student: at the router, and at the output of the model.

use super::{
    AuxLoss, lacks,
    softmax::{Sink, View, softmax},
};
use crate::error::{Error, Result};

/// `mean_t KL(p_ref ‖ p_t)`, where p_ref sums to 1.
pub(super) fn router_kl(view: &View<'_>, sink: &mut Sink<'_>) -> Result<f64> {
    let teacher = view.input.teacher.ok_or_else(|| lacks(AuxLoss::RouterKl, "a teacher"))?;
    let all = view.input.choices.tokens() * view.experts();
    if teacher.len() != all {
        return Err(Error::Internal(format!("{} probabilities of the teacher for {all}", teacher.len())));
    }
    let (n, temperature, mut p) = (view.tokens(), view.input.temperature, vec![0.0; view.experts()]);
    let mut sum = 0.0;
    for &t in &view.live {
        let (z, reference) = (view.z(t), view.row(teacher, t));
        let lse = softmax(z, temperature, &mut p);
        sum += z.iter().zip(reference).map(|(z, r)| divergence(*r, z / temperature - lse)).sum::<f64>();
        sink.direct(view, t, |e| (p[e] - reference[e]) / (temperature * n));
    }
    Ok(sum / n)
}

/// Distillation at the output (Hinton et al. 2015): `T² KL(teacher ‖ student)` of `softmax(logits / T)`, mean over rows of
/// `classes` logits. Adds the gradient with respect to the student's logits.
///
/// T² keeps the gradient's size when T changes. The slices are as long as one another; 0 for no row.
pub fn distill_kl(teacher: &[f64], student: &[f64], classes: usize, t: f64, d_student: &mut [f64]) -> f64 {
    let (mut p, mut q) = (vec![0.0; classes], vec![0.0; classes]);
    let rows = (student.len() / classes.max(1)).max(1) as f64;
    let mut sum = 0.0;
    for ((teacher, student), d) in teacher.chunks_exact(classes).zip(student.chunks_exact(classes)).zip(d_student.chunks_exact_mut(classes))
    {
        softmax(teacher, t, &mut p);
        let lse = softmax(student, t, &mut q);
        sum += student.iter().zip(&p).map(|(z, p)| divergence(*p, z / t - lse)).sum::<f64>();
        d.iter_mut().zip(q.iter().zip(&p)).for_each(|(d, (q, p))| *d += t * (q - p) / rows);
    }
    t * t * sum / rows
}

/// `p (ln p - log_q)`; 0 where p is.
fn divergence(p: f64, log_q: f64) -> f64 {
    if p > 0.0 { p * (p.ln() - log_q) } else { 0.0 }
}
