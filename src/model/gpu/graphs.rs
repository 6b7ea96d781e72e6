//! Decode steps that were recorded, to be launched again at the price of one launch.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use hardmax_kernels::Graph;

use super::{step::Sizes, weights::GpuWeights};

/// Steps that are kept. Each has some hundred kilobytes on the device.
const MOST: usize = 128;

/// What a recorded step depends on besides the words that it reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) sizes: Sizes,
    /// For each MoE layer its set of policies and most experts of a token.
    pub(super) layers: Vec<(usize, usize)>,
    /// Parts that the cache of a sequence is divided into.
    pub(super) splits: usize,
}

/// Recorded steps, by weights and key. They hold addresses: of the weights, of the arena, of the cache.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    of: HashMap<(usize, Key), Entry>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    /// The address is only theirs while they live.
    weights: Weak<GpuWeights>,
    /// `None`: it was run once. What is run for the first time loads its kernels, which cannot be recorded.
    graph: Option<Graph>,
    /// It could not be recorded, and is not tried again.
    refused: bool,
    used: u64,
}

/// What to do with a step.
#[derive(Debug)]
pub(super) enum Advice<'a> {
    /// Run it.
    Run,
    /// Record it, and launch that.
    Record,
    /// Launch this.
    Launch(&'a Graph),
}

impl Graphs {
    /// For a step on these weights.
    pub(super) fn advise(&mut self, weights: &Arc<GpuWeights>, key: &Key) -> Advice<'_> {
        self.clock += 1;
        let place = (Arc::as_ptr(weights) as usize, key.clone());
        let alive = self
            .of
            .get(&place)
            .is_some_and(|entry| std::ptr::eq(entry.weights.as_ptr(), Arc::as_ptr(weights)) && entry.weights.strong_count() > 0);
        if !alive {
            self.make_room();
            self.of.insert(place, Entry { weights: Arc::downgrade(weights), graph: None, refused: false, used: self.clock });
            return Advice::Run;
        }
        let clock = self.clock;
        match self.of.get_mut(&place) {
            Some(entry) => {
                entry.used = clock;
                match &entry.graph {
                    Some(graph) => Advice::Launch(graph),
                    None if entry.refused => Advice::Run,
                    None => Advice::Record,
                }
            }
            None => Advice::Run,
        }
    }

    /// Keeps what was recorded after [`Advice::Record`].
    pub(super) fn keep(&mut self, weights: &Arc<GpuWeights>, key: &Key, graph: Graph) {
        if let Some(entry) = self.of.get_mut(&(Arc::as_ptr(weights) as usize, key.clone())) {
            entry.graph = Some(graph);
        }
    }

    /// Notes that [`Advice::Record`] could not be followed.
    pub(super) fn refuse(&mut self, weights: &Arc<GpuWeights>, key: &Key) {
        if let Some(entry) = self.of.get_mut(&(Arc::as_ptr(weights) as usize, key.clone())) {
            entry.refused = true;
        }
    }

    /// Forgets all: what they point to has moved.
    pub(super) fn clear(&mut self) {
        self.of.clear();
    }

    /// Drops those whose weights are gone, and where that is not enough, the one that was not used for the longest time.
    fn make_room(&mut self) {
        self.of.retain(|_, entry| entry.weights.strong_count() > 0);
        if self.of.len() >= MOST
            && let Some(oldest) = self.of.iter().min_by_key(|(_, entry)| entry.used).map(|(place, _)| place.clone())
        {
            self.of.remove(&oldest);
        }
    }
}
