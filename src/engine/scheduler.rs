//! Who runs next: pure bookkeeping, without clock, channel or tensor.
//!
//! Sequences are admitted in order of arrival, each to a cache slot of its own. A step first gives one token to every sequence
//! that decodes, then what is left of its token budget to those that prefill, in order of arrival. Where the budget is smaller
//! than the number of decoding sequences they take turns.

use std::collections::{BTreeSet, VecDeque};

/// Names a sequence; later sequences have larger names.
pub(super) type SequenceId = u64;

/// What bounds a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Sequences that may hold a slot.
    pub(super) max_running: usize,
    /// Tokens of one step, at least 1.
    pub(super) max_step_tokens: usize,
}

/// What a running sequence could do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// This many tokens of its prompt are to be computed.
    Prefill(usize),
    /// One token is.
    Decode,
    /// Nothing: its reader has to catch up.
    Blocked,
}

/// A sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) id: SequenceId,
    pub(super) slot: usize,
    pub(super) tokens: usize,
}

/// Where a removed sequence was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Waiting,
    /// In this slot, which is free now.
    Running(usize),
}

/// Queue, slots, and turns.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    waiting: VecDeque<SequenceId>,
    /// In order of arrival, hence of id.
    running: Vec<(SequenceId, usize)>,
    /// Slots that were used and are free again.
    free: BTreeSet<usize>,
    /// Slots that were ever used: all above are free.
    used: usize,
    /// The last sequence that decoded when not all could.
    last_turn: SequenceId,
}

impl Scheduler {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, waiting: VecDeque::new(), running: Vec::new(), free: BTreeSet::new(), used: 0, last_turn: 0 }
    }

    /// Puts a sequence at the end of the queue.
    pub(super) fn enqueue(&mut self, id: SequenceId) {
        self.waiting.push_back(id);
    }

    /// Moves the next waiting sequence to a free slot.
    pub(super) fn admit(&mut self) -> Option<SequenceId> {
        if self.waiting.is_empty() {
            return None;
        }
        let slot = self.free_slot()?;
        let id = self.waiting.pop_front()?;
        self.running.push((id, slot));
        Some(id)
    }

    /// The lowest free slot.
    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.free.pop_first() {
            return Some(slot);
        }
        let slot = self.used;
        if slot == self.limits.max_running {
            return None;
        }
        self.used += 1;
        Some(slot)
    }

    /// Forgets a sequence, wherever it is.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Place> {
        if let Ok(index) = self.running.binary_search_by_key(&id, |&(id, _)| id) {
            let (_, slot) = self.running.remove(index);
            self.free.insert(slot);
            return Some(Place::Running(slot));
        }
        let index = self.waiting.iter().position(|&waiting| waiting == id)?;
        self.waiting.remove(index);
        Some(Place::Waiting)
    }

    /// Divides the next step. Empty if and only if no running sequence can do anything.
    pub(super) fn plan(&mut self, work: impl Fn(SequenceId) -> Work) -> Vec<Share> {
        let mut budget = self.limits.max_step_tokens;
        let mut decoding = Vec::new();
        let mut prefilling = Vec::new();
        for &(id, slot) in &self.running {
            match work(id) {
                Work::Decode => decoding.push(Share { id, slot, tokens: 1 }),
                Work::Prefill(tokens) if tokens > 0 => prefilling.push(Share { id, slot, tokens }),
                Work::Prefill(_) | Work::Blocked => {}
            }
        }
        if decoding.len() > budget {
            let turn = decoding.partition_point(|share| share.id <= self.last_turn);
            decoding.rotate_left(turn);
            decoding.truncate(budget);
            self.last_turn = decoding.last().map_or(0, |share| share.id);
        }
        budget -= decoding.len();
        let mut shares = decoding;
        for share in prefilling {
            if budget == 0 {
                break;
            }
            let tokens = share.tokens.min(budget);
            budget -= tokens;
            shares.push(Share { tokens, ..share });
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    fn scheduler(max_running: usize, max_step_tokens: usize) -> Scheduler {
        Scheduler::new(Limits { max_running, max_step_tokens })
    }

    #[test]
    fn decodes_come_first_and_prefills_share_the_rest_in_order() {
        let mut scheduler = scheduler(4, 10);
        (1..=4).for_each(|id| scheduler.enqueue(id));
        while scheduler.admit().is_some() {}
        let work = |id| match id {
            1 => Work::Prefill(7),
            2 => Work::Decode,
            3 => Work::Prefill(7),
            _ => Work::Blocked,
        };
        let plan: Vec<(u64, usize)> = scheduler.plan(work).iter().map(|share| (share.id, share.tokens)).collect();
        assert_eq!(plan, [(2, 1), (1, 7), (3, 2)]);
    }

    #[test]
    fn decodes_take_turns_when_the_budget_is_short() {
        let mut scheduler = scheduler(5, 2);
        (1..=5).for_each(|id| scheduler.enqueue(id));
        while scheduler.admit().is_some() {}
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.extend(scheduler.plan(|_| Work::Decode).iter().map(|share| share.id));
        }
        assert_eq!(seen, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn slots_cost_nothing_until_they_are_used() {
        let mut scheduler = scheduler(usize::MAX, 1);
        scheduler.enqueue(1);
        assert_eq!(scheduler.admit(), Some(1));
        assert_eq!(scheduler.remove(1), Some(Place::Running(0)));
        assert_eq!(scheduler.free.len(), 1);
    }

    #[test]
    fn slots_are_reused_lowest_first() {
        let mut scheduler = scheduler(2, 1);
        (1..=3).for_each(|id| scheduler.enqueue(id));
        assert_eq!((scheduler.admit(), scheduler.admit(), scheduler.admit()), (Some(1), Some(2), None));
        assert_eq!(scheduler.remove(3), Some(Place::Waiting));
        assert_eq!(scheduler.remove(1), Some(Place::Running(0)));
        assert_eq!(scheduler.remove(1), None);
        scheduler.enqueue(4);
        assert_eq!(scheduler.admit(), Some(4));
        assert_eq!(scheduler.remove(4), Some(Place::Running(0)));
    }

    /// Random arrivals, lengths, blocked readers and cancellations: the budget holds, slots are not shared, admission is in
    /// order, and everything ends soon after it is no longer blocked.
    #[test]
    fn random_loads_all_end() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (max_running, budget) = (rng.random_range(1..=6), rng.random_range(1..=12));
            let mut scheduler = scheduler(max_running, budget);
            let mut left: HashMap<u64, (usize, usize)> = HashMap::new();
            let mut running: HashSet<u64> = HashSet::new();
            let (mut next, mut admitted, mut step) = (1, 0, 0);
            loop {
                step += 1;
                if step < 200 && rng.random_bool(0.5) {
                    left.insert(next, (rng.random_range(1..40), rng.random_range(1..20)));
                    scheduler.enqueue(next);
                    next += 1;
                }
                if let Some(&id) = left.keys().min().filter(|_| rng.random_bool(0.05)) {
                    assert!(scheduler.remove(id).is_some());
                    left.remove(&id);
                    running.remove(&id);
                }
                while let Some(id) = scheduler.admit() {
                    assert!(id > admitted, "in order of arrival");
                    admitted = id;
                    running.insert(id);
                }
                let blocked: HashSet<u64> = running.iter().copied().filter(|_| step < 200 && rng.random_bool(0.3)).collect();
                let work = |id: u64| match left[&id] {
                    _ if blocked.contains(&id) => Work::Blocked,
                    (0, _) => Work::Decode,
                    (prefill, _) => Work::Prefill(prefill),
                };
                let plan = scheduler.plan(work);
                let used: usize = plan.iter().map(|share| share.tokens).sum();
                let wanted: usize =
                    running.iter().map(|&id| if let Work::Prefill(n) = work(id) { n } else { usize::from(work(id) == Work::Decode) }).sum();
                assert_eq!(used, wanted.min(budget), "the whole budget is used, and not more");
                assert!(running.len() <= max_running);
                assert_eq!(plan.iter().map(|share| share.slot).collect::<HashSet<_>>().len(), plan.len());
                for share in plan {
                    assert!(running.contains(&share.id) && !blocked.contains(&share.id) && share.slot < max_running && share.tokens > 0);
                    let rest = left.get_mut(&share.id).unwrap();
                    match rest {
                        (0, decodes) => *decodes -= share.tokens,
                        (prefill, _) => *prefill -= share.tokens,
                    }
                    if *rest == (0, 0) {
                        left.remove(&share.id);
                        running.remove(&share.id);
                        assert_eq!(scheduler.remove(share.id), Some(Place::Running(share.slot)));
                    }
                }
                if step >= 200 && left.is_empty() {
                    break;
                }
                assert!(step < 200 + 200 * 60, "starved");
            }
            assert_eq!(scheduler.free.len(), scheduler.used);
        }
    }
}
