//! What both sides of the engine see of each other: how many requests run and wait, and whether there is anyone.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{EngineConfig, generations::Tallies};
use crate::{
    error::{Error, QueueLimit, Result},
    moe::policy::LayerChoices,
    telemetry::metrics::{Metrics, Rejection},
};

pub use crate::telemetry::metrics::Mode;

/// Shortest and longest advice on when to try again.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A moment in the life of an engine. Each choice of a request counts as a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineStatus {
    /// Requests in the batch.
    pub running: usize,
    /// Requests that wait for a place in it, those that lost theirs included.
    pub waiting: usize,
    /// Tokens of the prompts of those that wait; the choices of a request have one prompt.
    pub waiting_tokens: usize,
    /// New requests are refused.
    pub draining: bool,
    /// The thread is there. `false` after [`super::Engine::shutdown`].
    pub alive: bool,
    /// Of the weights in force: those that a request which comes now runs on.
    pub generation: u64,
    /// Who has the machine besides requests.
    pub mode: Mode,
}

/// What both sides see.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) status: watch::Sender<EngineStatus>,
    pub(super) metrics: Arc<Metrics>,
    /// Tokens of prompts per second at full speed, as last measured; 0 before.
    pub(super) speed: AtomicU32,
    /// What came of generations.
    pub(super) tallies: Tallies,
    /// Routing in force where a request chooses none; `None` as long as nobody has said.
    serving: Mutex<Option<LayerChoices>>,
}

/// The place of one sequence in the counts. It is given back when this is dropped, however that comes about.
#[derive(Debug)]
pub(super) struct Ticket {
    shared: Arc<Shared>,
    tokens: usize,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting,
    Running,
}

impl Shared {
    pub(super) fn new(generation: u64, metrics: Arc<Metrics>) -> Self {
        let mode = Mode::default();
        let status = EngineStatus { running: 0, waiting: 0, waiting_tokens: 0, draining: false, alive: true, generation, mode };
        metrics.set_generation(generation);
        metrics.set_generations(1, 0, 0);
        let (speed, tallies) = (AtomicU32::new(0), Tallies::default());
        Self { status: watch::Sender::new(status), metrics, speed, tallies, serving: Mutex::default() }
    }

    /// Other weights are in force.
    pub(super) fn set_generation(&self, generation: u64) {
        self.metrics.set_generation(generation);
        self.update(|status| status.generation = generation);
    }

    /// The machine is given to these.
    pub(super) fn set_mode(&self, mode: Mode) {
        self.metrics.set_mode(mode);
        self.update(|status| status.mode = mode);
    }

    /// What was in force before.
    pub(super) fn set_serving(&self, choices: LayerChoices) -> Option<LayerChoices> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).replace(choices)
    }

    pub(super) fn serving(&self) -> Option<LayerChoices> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the status, and the gauges that show it, as one.
    pub(super) fn update(&self, change: impl FnOnce(&mut EngineStatus)) {
        self.status.send_if_modified(|status| {
            let before = *status;
            change(status);
            self.metrics.set_requests(status.running, status.waiting);
            *status != before
        });
    }

    /// Takes places in the queue for `choices` sequences with one prompt of `tokens` tokens.
    ///
    /// The queue is full when batch and queue together are: what a free place will take at once does not wait. It is also full when the
    /// prompts in it have too many tokens; where nothing waits, one of any length may.
    pub(super) fn count_in(self: &Arc<Self>, choices: usize, tokens: usize, config: &EngineConfig) -> Result<Vec<Ticket>> {
        let places = config.max_batch_requests.saturating_add(config.max_queue_requests);
        if choices > places {
            let message = format!("{choices} are more than the {places} places in the batch and the queue of this server");
            return Err(Error::out_of_range("sampling.n", message));
        }
        let mut refusal = None;
        self.update(|status| {
            let full = |limit| Some((Some(Rejection::QueueFull), Error::QueueFull { limit, retry_after: self.retry_after(status) }));
            refusal = if status.draining {
                Some((Some(Rejection::Draining), Error::Draining))
            } else if !status.alive {
                Some((None, Error::Internal("the engine thread died".into())))
            } else if status.mode == Mode::TuneExclusive {
                Some((Some(Rejection::Tuning), Error::Tuning))
            } else if status.running + status.waiting + choices > places {
                full(QueueLimit::Requests(config.max_queue_requests))
            } else if status.waiting > 0 && status.waiting_tokens.saturating_add(tokens) > config.max_queue_tokens {
                full(QueueLimit::Tokens(config.max_queue_tokens))
            } else {
                status.waiting += choices;
                status.waiting_tokens = status.waiting_tokens.saturating_add(tokens);
                None
            };
        });
        let Some((reason, error)) = refusal else {
            let ticket = |choice| Ticket { shared: self.clone(), tokens: if choice == 0 { tokens } else { 0 }, place: Place::Waiting };
            return Ok((0..choices).map(ticket).collect());
        };
        if let Some(reason) = reason {
            self.metrics.rejected(reason);
        }
        Err(error)
    }

    /// How long the prompts that wait will take, as far as is known.
    fn retry_after(&self, status: &EngineStatus) -> Duration {
        let (least, most) = RETRY_AFTER;
        match self.speed.load(Ordering::Relaxed) {
            0 => least,
            speed => Duration::from_secs((status.waiting_tokens / speed as usize) as u64).clamp(least, most),
        }
    }

    /// Why a request got no last event: the engine went away before or after it was read.
    pub(super) fn why_stopped(&self) -> Error {
        if self.status.borrow().draining { Error::Draining } else { Error::Internal("the engine thread died".into()) }
    }
}

impl Ticket {
    /// From the queue to the batch.
    pub(super) fn run(&mut self) {
        self.change(Some(Place::Running));
    }

    /// Back to the queue.
    pub(super) fn wait(&mut self) {
        self.change(Some(Place::Waiting));
    }

    fn change(&mut self, place: Option<Place>) {
        let tokens = self.tokens;
        self.shared.update(|status| {
            match self.place {
                Place::Waiting => {
                    status.waiting = status.waiting.saturating_sub(1);
                    status.waiting_tokens = status.waiting_tokens.saturating_sub(tokens);
                }
                Place::Running => status.running = status.running.saturating_sub(1),
            }
            match place {
                Some(Place::Waiting) => {
                    status.waiting += 1;
                    status.waiting_tokens = status.waiting_tokens.saturating_add(tokens);
                }
                Some(Place::Running) => status.running += 1,
                None => {}
            }
        });
        self.place = place.unwrap_or(self.place);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.change(None);
    }
}
