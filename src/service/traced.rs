//! Requests on their way to the engine and back, and what their spans are told of it, however they end.

use std::{
    pin::Pin,
    sync::Arc,
    task::{self, Poll, ready},
    time::Instant,
};

use tokio_stream::Stream;

use super::{call::Call, context::Context};
use crate::{
    engine::{Event, EventStream, Finished, Milestones, Request, Task},
    error::Result,
    moe::policy::LayerChoices,
    telemetry::otel::{Phases, RequestSpan, Usage},
};

/// The events of a request, counted for its span. **Dropping it cancels the request**, and tells the span what became of it.
#[derive(Debug)]
pub(super) struct TracedEvents {
    events: EventStream,
    progress: Progress,
}

#[derive(Debug)]
struct Progress {
    span: RequestSpan,
    milestones: Arc<Milestones>,
    /// Choices that have not finished.
    open: usize,
    usage: Option<Usage>,
    /// When the last choice so far had its last token.
    last: Option<Instant>,
}

/// Puts the request of `call` in the engine's queue.
pub(super) fn submit(context: &Context, call: &Call, request: Request) -> Result<TracedEvents> {
    let (operation, choices) = match &request.task {
        Task::Generate(params) => ("text_completion", params.n),
        Task::Score { .. } => ("score", 1),
        Task::Read => ("read", 1),
    };
    call.span.asks(operation, &context.config.model_name, || describe(&request.routing));
    let events = context.engine.submit(request)?;
    let (span, milestones) = (call.span.clone(), events.milestones().clone());
    Ok(TracedEvents { events, progress: Progress { span, milestones, open: choices, usage: None, last: None } })
}

/// As the flag `--routing` spells it; layer by layer where they differ.
fn describe(routing: &LayerChoices) -> String {
    match routing {
        LayerChoices::Same(choice) => choice.to_string(),
        LayerChoices::Each(choices) => choices.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        LayerChoices::Replay { .. } => "replay".into(),
    }
}

impl Stream for TracedEvents {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Event>> {
        let event = ready!(Pin::new(&mut self.events).poll_next(cx));
        if let Some(Event::Finished(finished)) = &event {
            self.progress.finished(finished);
        }
        Poll::Ready(event)
    }
}

// === impl Progress ===

impl Progress {
    /// A choice has finished.
    fn finished(&mut self, finished: &Finished) {
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

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.span.is_recorded() {
            return;
        }
        if let Some(usage) = &self.usage {
            self.span.used(usage);
        }
        self.span.phases(&Phases {
            submitted: self.milestones.submitted(),
            first_step: self.milestones.first_step(),
            first_token: self.milestones.first_token(),
            ended: self.last.filter(|_| self.open == 0).unwrap_or_else(Instant::now),
        });
    }
}
