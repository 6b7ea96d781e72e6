//! The reading end of a request.

use std::{
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll, ready},
};

use tokio_stream::Stream;

use super::{
    request::{Event, Milestones},
    scheduler::SequenceId,
    status::Shared,
    worker::Command,
};
use crate::moe::trace::RoutingTrace;

/// Bytes of traces that the channel of a request may have for each place of
/// [`EngineConfig::event_buffer`](super::EngineConfig::event_buffer): the trace of one step can have megabytes.
const PLACE_BYTES: usize = 16 << 10;

/// Events of one request: any number of `Tokens` and one `Finished` for each of its choices, or one `Failed` for all that have not
/// finished; then `None`.
///
/// **Dropping it cancels the request.** A reader that is too slow pauses its own request and no other; while it is behind, others may
/// take its cache blocks and, after a moment, its place in the batch; after
/// [`EngineConfig::reader_timeout`](super::EngineConfig::reader_timeout) the request ends.
#[derive(Debug)]
pub struct EventStream {
    events: tokio::sync::mpsc::Receiver<Event>,
    unread: Arc<UnreadTraces>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    ids: Range<SequenceId>,
    milestones: Arc<Milestones>,
    /// Choices that have not finished; 0 at the end.
    left: usize,
}

/// How much of the traces of a request its reader has not taken yet.
#[derive(Debug)]
pub(super) struct UnreadTraces {
    bytes: AtomicUsize,
    most: usize,
}

impl UnreadTraces {
    pub(super) fn new(event_buffer: usize) -> Self {
        Self { bytes: AtomicUsize::new(0), most: event_buffer.saturating_mul(PLACE_BYTES) }
    }

    /// A trace is about to be sent. Before it is: so that its reader does not subtract what was not added.
    pub(super) fn add(&self, trace: &RoutingTrace) {
        self.bytes.fetch_add(trace.bytes(), Ordering::Relaxed);
    }

    fn taken(&self, trace: Option<&RoutingTrace>) {
        if let Some(trace) = trace {
            self.bytes.fetch_sub(trace.bytes(), Ordering::Relaxed);
        }
    }

    /// The request is to wait for its reader.
    pub(super) fn are_too_many(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > self.most
    }
}

impl EventStream {
    pub(super) fn new(
        events: tokio::sync::mpsc::Receiver<Event>,
        unread: Arc<UnreadTraces>,
        shared: Arc<Shared>,
        commands: mpsc::Sender<Command>,
        ids: Range<SequenceId>,
        milestones: Arc<Milestones>,
    ) -> Self {
        let left = ids.clone().count();
        Self { events, unread, shared, commands, ids, milestones, left }
    }

    /// How far the request has come; it is kept up to date after the stream is gone.
    pub fn milestones(&self) -> &Arc<Milestones> {
        &self.milestones
    }

    /// The next event; `None` after the last one. Cancel safe.
    pub async fn recv(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(cx)).unwrap_or_else(|| Event::Failed(self.shared.why_stopped()));
        match &event {
            Event::Tokens(tokens) => self.unread.taken(tokens.trace.as_deref()),
            Event::Finished(finished) => {
                self.unread.taken(finished.tail.trace.as_deref());
                self.left -= 1;
            }
            Event::Failed(_) => self.left = 0,
        }
        Poll::Ready(Some(event))
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.get_mut().poll_event(cx)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if self.left > 0 {
            // A thread that is gone has nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.ids.clone()));
        }
    }
}
