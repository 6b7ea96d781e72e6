//! What a run looks like: a bar while it goes on, a table and a JSON object when it is done.

use std::{fmt::Write as _, io::IsTerminal as _, time::Duration};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::tune::{
    candidate::Candidate,
    config::TuneConfig,
    evaluate::{Figures, RoutingFigures},
    gates::Verdict,
    memory::MemoryPlan,
    tuner::{Event, Phase, Step},
};

/// The bar.
pub(super) struct Progress {
    bar: ProgressBar,
    last: String,
    gap: String,
}

impl Progress {
    pub(super) fn new(steps: usize) -> Self {
        let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr_with_hz(4) } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        Self { bar: ProgressBar::with_draw_target(Some(steps as u64), target).with_style(style), last: String::new(), gap: String::new() }
    }

    pub(super) fn show(&mut self, event: &Event) {
        match event {
            Event::Phase(Phase::Baseline) => self.bar.set_message("measuring the model as it is"),
            Event::Phase(Phase::Training | Phase::Saving) | Event::Baseline(_) => {}
            Event::Phase(Phase::Evaluating) => self.bar.set_message(format!("{}{}  evaluating", self.last, self.gap)),
            Event::Evaluated(_) => self.bar.tick(),
            Event::Step(Step { step, loss, tokens_per_second, eta_seconds, .. }) => {
                let eta = HumanDuration(Duration::from_secs(*eta_seconds as u64));
                self.last = format!("loss {loss:.3}  {tokens_per_second:.0} tok/s  eta {eta:#}");
                self.bar.set_position(*step as u64);
                self.bar.set_message(format!("{}{}", self.last, self.gap));
            }
            Event::Evaluation { step, figures } => {
                let Some(serving) = figures.serving() else { return };
                self.gap = format!("  gap {:.3}", serving.kl);
                let RoutingFigures { routing, perplexity, kl, teacher_kl, .. } = serving;
                let line =
                    format!("step {step}: {routing} perplexity {perplexity:.3}, own gap {kl:.4}, to the model before {teacher_kl:.4} nats");
                self.say(&line);
            }
        }
    }

    /// A line above the bar.
    pub(super) fn say(&self, line: &str) {
        self.bar.suspend(|| tracing::info!("{line}"));
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Bytes that a run took beside the model.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Memory {
    /// As worked out before it began.
    pub(super) planned: MemoryPlan,
    /// As it was; `None` where the system does not say.
    pub(super) growth: Option<u64>,
}

/// Everything, as JSON.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    config: &'a TuneConfig,
    corpus_sha256: &'a str,
    memory: Memory,
    trained: Vec<&'a str>,
    steps: usize,
    reason: &'static str,
    before: &'a Figures,
    after: &'a Figures,
    verdicts: &'a [Verdict],
    passes: bool,
    progress: &'a [Event],
}

impl<'a> Report<'a> {
    pub(super) fn new(
        config: &'a TuneConfig,
        candidate: &'a Candidate,
        corpus_sha256: &'a str,
        memory: Memory,
        progress: &'a [Event],
    ) -> Self {
        Self {
            config,
            corpus_sha256,
            memory,
            trained: candidate.tensors.keys().map(String::as_str).collect(),
            steps: candidate.steps,
            reason: candidate.reason,
            before: &candidate.before,
            after: &candidate.after,
            verdicts: &candidate.verdicts,
            passes: candidate.passes(),
            progress,
        }
    }
}

/// Before and after, and the gates.
pub(super) fn table(before: &Figures, after: &Figures, verdicts: &[Verdict], steps: usize) -> String {
    let mut text = format!("{} held-out tokens, {steps} steps\n\n", before.tokens);
    let mut row = |cells: [&str; 8]| {
        let [routing, when, rest @ ..] = cells;
        let _ = write!(text, "{routing:<10} {when:<6}");
        rest.iter().for_each(|cell| _ = write!(text, " {cell:>11}"));
        text.push('\n');
    };
    row(["routing", "", "perplexity", "own gap", "to before", "top-1 agree", "dead", "use min"]);
    for (when, figures) in [("before", before), ("after", after)] {
        row(["reference", when, &format!("{:.3}", figures.reference_perplexity), "", "", "", "", ""]);
    }
    for (before, after) in before.routings.iter().zip(&after.routings) {
        for (when, figures) in [("before", before), ("after", after)] {
            let least = figures.utilization.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            row([
                &figures.routing,
                when,
                &format!("{:.3}", figures.perplexity),
                &format!("{:.4}", figures.kl),
                &format!("{:.4}", figures.teacher_kl),
                &format!("{:.2} %", 100.0 * figures.top1_agree),
                &figures.dead.iter().sum::<usize>().to_string(),
                &format!("{least:.3}"),
            ]);
        }
    }
    text.push('\n');
    for Verdict { gate, passed, current, candidate, limit } in verdicts {
        let told = if *passed { "holds" } else { "does not hold" };
        let _ = writeln!(text, "gate {gate}: {told}: {candidate:.4} after, {current:.4} before, at most {limit:.4}");
    }
    text.push_str("\nGaps are KL divergences of next-token distributions in nats per token: the own gap is from the reference routing of the \
                   same weights,\n`to before` from that of the model before. `use min` is the least load of an expert over its fair share.\n");
    text
}
