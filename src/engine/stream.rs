//! The reading end of a request.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::{Shared, request::Event};
use crate::error::Error;

/// Events of one request: any number of `Tokens`, then exactly one `Finished` or `Failed`, then `None`.
///
/// **Dropping it cancels the request.** A reader that is too slow pauses its own request and no other; after
/// [`EngineConfig::reader_timeout`](super::EngineConfig::reader_timeout) the request ends, because it holds a slot.
#[derive(Debug)]
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
    ended: bool,
}

impl EventStream {
    pub(super) fn new(events: mpsc::Receiver<Event>, shared: Arc<Shared>) -> Self {
        Self { events, shared, ended: false }
    }

    /// The next event; `None` after the last one. Cancel safe.
    pub async fn recv(&mut self) -> Option<Event> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(cx)).unwrap_or_else(|| Event::Failed(self.shared.why_stopped()));
        self.ended = matches!(event, Event::Finished(_) | Event::Failed(_));
        Poll::Ready(Some(event))
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.get_mut().poll_event(cx)
    }
}

impl Shared {
    /// Why a request got no last event: the engine went away before or after it was read.
    pub(super) fn why_stopped(&self) -> Error {
        if self.status.borrow().draining { Error::Draining } else { Error::Internal("the engine thread died".into()) }
    }
}
