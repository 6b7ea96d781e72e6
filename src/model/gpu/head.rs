//! Logits, and what is drawn of them.

use std::ops::Range;

use hardmax_kernels::{norm::RmsNorm, sample::Sample};

use super::{Machine, Step, layer::Product, profile::Class, weights::GpuWeights};
use crate::{error::Result, model::draw::RowChoice};

impl Machine {
    /// Makes the rows of logits that a batch asks for, some at once; draws what is to be drawn, and appends the others to `handed_out`.
    pub(super) fn head(&mut self, weights: &GpuWeights, step: &Step<'_>, handed_out: &mut Vec<f32>) -> Result<()> {
        let (rows, at_once) = (step.sizes.rows, step.values.head_rows);
        for first in (0..rows).step_by(at_once.max(1)) {
            self.head_rows(weights, step, first, at_once.min(rows - first), handed_out)?;
        }
        self.clock.mark(self.stream, Class::Head)
    }

    fn head_rows(&mut self, weights: &GpuWeights, step: &Step<'_>, first: usize, count: usize, handed_out: &mut Vec<f32>) -> Result<()> {
        let (spec, values, layout) = (step.spec, step.values, step.layout);
        let (d, vocabulary) = (spec.hidden_size, spec.vocab_size);
        let Self { stream, blas, arena, words, report, .. } = self;
        let (stream, words) = (*stream, words.device.view());
        let norm = RmsNorm {
            x: arena.view(values.x),
            pick: Some(words.part(layout.rows.clone()).part(first..first + count)),
            weight: weights.final_norm.view(),
            out: arena.view(values.head),
            out_f32: None,
            epsilon: spec.rms_norm_eps as f32,
            rows: count,
            width: d,
        };
        norm.launch(stream)?;
        let (x, weight, logits) = (arena.view(values.head), weights.head().view(), arena.view(values.logits));
        Product { x, weight, y: logits, stride: vocabulary, rows: count, n: vocabulary, k: d, add: false }.launch(blas, stream)?;
        let choices = &step.batch.choices;
        if !choices.is_empty() {
            let sample = Sample {
                logits,
                choices: words.part(layout.draws.clone()).cast()?.part(first..first + count),
                tokens: report.device.view().part(values.report.drawn.clone()).part(first..first + count),
                rows: count,
                vocabulary,
            };
            sample.launch(stream)?;
        }
        // Padding rows are behind those of the batch, and nobody's.
        let here = first..(first + count).min(step.batch.num_logit_rows());
        for run in runs(here, choices) {
            let part = logits.part((run.start - first) * vocabulary..(run.end - first) * vocabulary);
            handed_out.extend(part.to_vec(stream)?);
        }
        Ok(())
    }
}

/// Runs of the rows that are handed out.
fn runs(rows: Range<usize>, choices: &[RowChoice]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for row in rows.filter(|&row| choices.get(row).is_none_or(|choice| matches!(choice, RowChoice::Logits))) {
        match runs.last_mut().filter(|run| run.end == row) {
            Some(run) => run.end += 1,
            None => runs.push(row..row + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::draw::TokenDraw;

    #[test]
    fn rows_are_handed_out_in_runs() {
        let (row, token) = (RowChoice::Logits, RowChoice::Token(TokenDraw::LIKELIEST));
        assert_eq!(runs(3..7, &[row, row, row, row, token]), [3..4, 5..7]);
        assert_eq!(runs(0..6, &[row, row, token, row, token, token]), [0..2, 3..4]);
        assert_eq!(runs(1..5, &[row, row, token, row, token]), [1..2, 3..4]);
        assert!(runs(0..2, &[token, token]).is_empty());
    }
}
