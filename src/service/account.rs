//! What a trace is told of a request in the engine, however the request ends.

use std::{sync::Arc, time::Instant};

use crate::{
    engine::{EventStream, Finished, Milestones},
    telemetry::otel::{Phases, Trace, Usage},
};

/// Collects what became of a request, and gives it to the request's trace when it is dropped: after the last choice, after a failure, or
/// because nobody reads on.
#[derive(Debug)]
pub(super) struct Account {
    trace: Trace,
    milestones: Arc<Milestones>,
    /// Choices that have not finished.
    open: usize,
    usage: Option<Usage>,
    /// When the last choice so far had its last token.
    last: Option<Instant>,
}

impl Account {
    /// Of the request behind `events`, which has `choices`.
    pub(super) fn new(trace: Trace, events: &EventStream, choices: usize) -> Self {
        Self { trace, milestones: events.milestones().clone(), open: choices, usage: None, last: None }
    }

    /// A choice has finished.
    pub(super) fn finished(&mut self, finished: &Finished) {
        self.open = self.open.saturating_sub(1);
        let spent = finished.timing.queue + finished.timing.prefill + finished.timing.decode;
        self.last = self.last.max(self.milestones.submitted().checked_add(spent));
        let before = self.usage.unwrap_or_default();
        self.usage = Some(Usage {
            input_tokens: finished.prompt_tokens,
            // Later choices find the prompt of the first one.
            cached_tokens: if finished.choice == 0 { finished.cached_prompt_tokens } else { before.cached_tokens },
            output_tokens: before.output_tokens + finished.generated_tokens,
            generation: finished.generation,
        });
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if !self.trace.is_recorded() {
            return;
        }
        if let Some(usage) = &self.usage {
            self.trace.used(usage);
        }
        self.trace.phases(&Phases {
            submitted: self.milestones.submitted(),
            first_step: self.milestones.first_step(),
            first_token: self.milestones.first_token(),
            ended: self.last.filter(|_| self.open == 0).unwrap_or_else(Instant::now),
        });
    }
}
