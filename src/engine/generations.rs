//! The weights that requests run on: those in force, and older ones as long as there is a request that began on them.
//!
//! A sequence holds the set that it began on, so an older one goes with its last sequence, however that ends: nothing has to be counted.
//! The model has one set at a time. Between steps it is the one in force; within a step the worker gives it each set for which there is
//! something to compute. The cache is that of all of them: a block belongs to sequences, and a known prefix is named by its generation.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use super::background::{ObservableSource, Source};
use crate::{
    error::{Error, Result},
    model::{LanguageModel, SharedWeights},
};

/// Generation of the weights of a checkpoint as it was loaded.
pub const FIRST_GENERATION: u64 = 1;

/// A set of weights for [`Engine::publish`](super::Engine::publish).
pub struct Generation {
    /// Names these values and no others, ever: what is cached under a number is found again when the number comes back. At least
    /// [`FIRST_GENERATION`].
    pub number: u64,
    /// Of the kind of model that is served, and of its spec.
    pub weights: SharedWeights,
    /// Models over the same weights, where the engine was started with [`EngineParts::background`](super::EngineParts::background).
    pub source: Option<Box<dyn ObservableSource>>,
}

/// What becomes of the requests that are inside when other weights come into force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InFlight {
    /// Each ends on the weights that it began on.
    #[default]
    Finish,
    /// Continuations go on under the new weights, which read all their tokens anew; what was sent stays sent. Scores and traces end on the
    /// weights that they began on: half of one and half of another would be neither.
    Migrate,
}

/// What [`Engine::publish`](super::Engine::publish) did. Each choice of a request counts as a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switched {
    /// Generation that was in force before.
    pub previous: u64,
    /// Requests inside that end on older generations.
    pub staying: usize,
    /// Requests inside that go on under the new one.
    pub migrated: usize,
    /// How long the engine did nothing else.
    pub took: Duration,
}

/// What has come of a generation since the engine was started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Requests that ended well, each choice being one.
    pub finished: u64,
    /// Requests that failed by no fault of their client: not those that were cancelled, too late or not read, nor those that the end of
    /// the server ended.
    pub failed: u64,
    /// Shadow samples that were measured since the routing in force is in force.
    pub samples: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Sum of `KL(reference ‖ serving)` over those, in nats.
    pub kl: f64,
}

/// A set of weights in the engine. It goes with the last who holds it.
pub(super) struct Resident {
    pub(super) number: u64,
    /// Empty until the model first has others: as long it holds them itself.
    weights: OnceLock<SharedWeights>,
    pub(super) source: Option<Source>,
}

/// All of them, and which the model has.
#[derive(Debug)]
pub(super) struct Generations {
    current: Arc<Resident>,
    loaded: Arc<Resident>,
    /// Those that were in force before; some of them are gone.
    older: Vec<Weak<Resident>>,
}

/// What both sides of the engine know of what came of generations: a few numbers for each that ever served something.
#[derive(Debug, Default)]
pub(super) struct Tallies(Mutex<BTreeMap<u64, Tally>>);

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").field("number", &self.number).field("weights", &self.weights).finish_non_exhaustive()
    }
}

// === impl Resident ===

impl Resident {
    fn new(number: u64, weights: OnceLock<SharedWeights>, source: Option<Arc<dyn ObservableSource>>) -> Arc<Self> {
        let source = source.map(|models| Source { generation: number, models });
        Arc::new(Self { number, weights, source })
    }
}

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resident").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        tracing::debug!(generation = self.number, "a generation has left the engine");
    }
}

// === impl Generations ===

impl Generations {
    /// The model runs on the weights that it was made with.
    pub(super) fn new(number: u64, source: Option<Box<dyn ObservableSource>>) -> Self {
        let current = Resident::new(number, OnceLock::new(), source.map(Arc::from));
        Self { loaded: Arc::clone(&current), current, older: Vec::new() }
    }

    /// The one in force.
    pub(super) fn current(&self) -> &Arc<Resident> {
        &self.current
    }

    /// Generations in memory.
    pub(super) fn resident(&self) -> usize {
        1 + self.older.iter().filter(|older| older.strong_count() > 0).count()
    }

    /// Puts a generation in force and gives `model` its weights. Where requests still run on that number, it is theirs that come back.
    ///
    /// Fails, and changes nothing, with `InvalidArgument` for a number below the first, with `FailedPrecondition` for the one in force or
    /// weights that the model cannot run on. Returns the number that was in force before.
    pub(super) fn publish(&mut self, model: &mut dyn LanguageModel, generation: Generation) -> Result<u64> {
        let Generation { number, weights, source } = generation;
        let previous = self.current.number;
        if number < FIRST_GENERATION {
            return Err(Error::invalid("generation", format!("{number} is no generation: the first is {FIRST_GENERATION}")));
        }
        if number == previous {
            return Err(Error::FailedPrecondition(format!("generation {number} is in force already")));
        }
        if self.current.source.is_some() && source.is_none() {
            let message = format!("generation {number} comes without models to measure with, which this engine was started with");
            return Err(Error::FailedPrecondition(message));
        }
        let known = self.older.iter().filter_map(Weak::upgrade).find(|older| older.number == number);
        let next = known.unwrap_or_else(|| Resident::new(number, weights.into(), source.map(Arc::from)));
        self.load(model, &next)?;
        self.older.retain(|older| older.upgrade().is_some_and(|older| older.number != number));
        self.older.push(Arc::downgrade(&self.current));
        self.current = next;
        Ok(previous)
    }

    /// Gives `model` the weights of a generation, if it has others.
    pub(super) fn load(&mut self, model: &mut dyn LanguageModel, generation: &Arc<Resident>) -> Result<()> {
        if Arc::ptr_eq(&self.loaded, generation) {
            return Ok(());
        }
        let weights = generation.weights.get().cloned();
        let weights = weights.ok_or_else(|| Error::Internal(format!("generation {} has lost its weights", generation.number)))?;
        let before = model.exchange(weights)?;
        self.loaded.weights.get_or_init(|| before);
        self.loaded = Arc::clone(generation);
        Ok(())
    }

    /// Gives `model` the weights in force: what is older is held by its sequences only.
    pub(super) fn load_current(&mut self, model: &mut dyn LanguageModel) -> Result<()> {
        let current = Arc::clone(&self.current);
        self.load(model, &current)
    }
}

// === impl Tallies ===

impl Tallies {
    /// So far.
    pub(super) fn get(&self, generation: u64) -> Tally {
        self.lock().get(&generation).copied().unwrap_or_default()
    }

    /// A request has ended; `well`, or by no fault of its client.
    pub(super) fn ended(&self, generation: u64, well: bool) {
        self.change(generation, |tally| *if well { &mut tally.finished } else { &mut tally.failed } += 1);
    }

    /// A shadow sample was measured.
    pub(super) fn measured(&self, generation: u64, tokens: u64, kl: f64) {
        self.change(generation, |tally| {
            tally.samples += 1;
            tally.tokens += tokens;
            tally.kl += kl;
        });
    }

    /// Another routing is in force: what was measured says nothing of it.
    pub(super) fn forget_samples(&self) {
        for tally in self.lock().values_mut() {
            (tally.samples, tally.tokens, tally.kl) = (0, 0, 0.0);
        }
    }

    fn change(&self, generation: u64, change: impl FnOnce(&mut Tally)) {
        change(self.lock().entry(generation).or_default());
    }

    /// Numbers are still good after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Tally>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
