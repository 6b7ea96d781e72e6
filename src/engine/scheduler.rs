//! Who runs next, and in which blocks: pure bookkeeping, without clock, channel or tensor.
//!
//! **Order.** Sequences have a [`Rank`]: earlier arrivals go first, and each step of priority is worth a head start of
//! [`Limits::priority_step`]. So a sequence of any priority is overtaken only for so long, and nobody starves.
//!
//! **Admission.** In order of rank, while there are places in the batch, and blocks for all tokens that are known of the running
//! sequences and of the new one (and one more for each, to grow). The longest published prefix is taken over instead of being computed.
//! Who comes first and does not fit is waited for. The further choices of a request wait until the first has computed the prompt.
//!
//! **A step.** One token goes to every sequence that has one left to compute, which is decoding; where the budget is too small for that
//! they take turns. Of the rest, half goes to the prefill with the best rank, so that it always advances, and the other half to the
//! shortest prefills, so that a short prompt does not wait for a long one; what one half leaves goes to the other.
//!
//! **Blocks** are given out as sequences grow. When there are none left, the running sequence with the worst rank below that of the one
//! that needs a block (before all of them: one whose reader is behind) is preempted: its blocks are released, it goes back to its place in
//! the queue, and its tokens are computed again later. If nobody can advance otherwise, the best ranked does. Since a sequence that does
//! not fit into the cache alone is refused at the door, there is no deadlock.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    time::Duration,
};

use super::blocks::{BlockId, BlockPool, Parent, Salt};
use crate::model::CacheShape;

/// Names a sequence.
pub(super) type SequenceId = u64;

/// The larger priorities count as this one: even they overtake others for a limited time only.
pub(super) const MAX_PRIORITY: i32 = 100;

/// What bounds a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Sequences that may run.
    pub(super) max_running: usize,
    /// Tokens of one step, at least 1.
    pub(super) max_step_tokens: usize,
    /// The head start that one step of priority gives.
    pub(super) priority_step: Duration,
}

/// Sequences that arrive together: the choices of one request.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) ids: Range<SequenceId>,
    /// Since some fixed moment.
    pub(super) at: Duration,
    pub(super) priority: i32,
    /// Tokens of the prompt, at least 1.
    pub(super) tokens: usize,
    /// Whose published blocks are theirs too; `None` to share nothing.
    pub(super) salt: Option<Salt>,
}

/// Whether a sequence can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    Ready,
    /// Its reader is behind.
    Paused,
    /// It has been for so long that others may have its place.
    Stalled,
}

/// What the scheduler asks about sequences.
pub(super) trait Sequences {
    fn readiness(&self, id: SequenceId) -> Readiness;

    /// Its known tokens.
    fn tokens(&self, id: SequenceId) -> &[u32];

    /// So many of its first tokens need not be computed if they are in the cache: nobody needs their logits.
    fn reusable(&self, id: SequenceId) -> usize;
}

/// A sequence's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) id: SequenceId,
    /// Tokens already in its blocks.
    pub(super) past: usize,
    /// Tokens to compute, at least 1.
    pub(super) tokens: usize,
}

/// A sequence that has just got a place in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    pub(super) id: SequenceId,
    /// Tokens that could have been in the cache.
    pub(super) reusable: usize,
    /// Tokens that were.
    pub(super) reused: usize,
}

/// The order of all sequences: smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(i128, SequenceId);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// For the first choice of its request.
    Behind,
    Waiting,
    Running,
}

#[derive(Debug)]
struct Entry {
    rank: Rank,
    place: Place,
    /// Tokens known, all of which are to be computed.
    length: usize,
    /// Tokens in its blocks.
    computed: usize,
    blocks: Vec<BlockId>,
    salt: Option<Salt>,
    /// What its next block to publish continues; `None` if it publishes nothing.
    parent: Option<Parent>,
    published: usize,
    /// Choices that wait for this one to have computed `shared` tokens.
    followers: Range<SequenceId>,
    shared: usize,
}

/// Queue, places, blocks, and turns.
pub(super) struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    entries: HashMap<SequenceId, Entry>,
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    /// Since they were last asked for.
    preempted: Vec<SequenceId>,
    /// The last sequence that decoded when not all could.
    last_turn: SequenceId,
    decoding: Vec<Wish>,
    prefilling: Vec<Wish>,
}

/// Tokens that a running sequence could compute, then those that it may.
#[derive(Clone, Copy, Debug)]
struct Wish {
    rank: Rank,
    tokens: usize,
}

impl Scheduler {
    pub(super) fn new(limits: Limits, cache: CacheShape) -> Self {
        Self {
            limits,
            pool: BlockPool::new(cache),
            entries: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            preempted: Vec::new(),
            last_turn: 0,
            decoding: Vec::new(),
            prefilling: Vec::new(),
        }
    }

    /// The blocks.
    pub(super) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Nothing that was computed until now will be found as a prefix.
    pub(super) fn forget_prefixes(&mut self) {
        self.pool.forget_all();
        for entry in self.entries.values_mut() {
            // What follows would continue a chain that is not there.
            entry.parent = None;
        }
    }

    /// Sequences that lost their place since this was last called.
    pub(super) fn take_preempted(&mut self) -> Vec<SequenceId> {
        std::mem::take(&mut self.preempted)
    }

    /// Puts sequences into the queue.
    pub(super) fn enqueue(&mut self, arrival: &Arrival) {
        let head_start = i128::from(arrival.priority.clamp(-MAX_PRIORITY, MAX_PRIORITY)) * nanos(self.limits.priority_step);
        let (moment, first) = (nanos(arrival.at) - head_start, arrival.ids.start);
        let block_tokens = self.pool.shape().block_tokens;
        // At least one token is left for each choice, which needs its logits.
        let shared = if arrival.salt.is_some() { arrival.tokens.saturating_sub(1) / block_tokens * block_tokens } else { 0 };
        for id in arrival.ids.clone() {
            let leads = shared == 0 || id == first;
            let rank = Rank(moment, id);
            if leads {
                self.waiting.insert(rank);
            }
            let entry = Entry {
                rank,
                place: if leads { Place::Waiting } else { Place::Behind },
                length: arrival.tokens,
                computed: 0,
                blocks: Vec::new(),
                salt: arrival.salt,
                parent: None,
                published: 0,
                followers: if shared > 0 && id == first { first + 1..arrival.ids.end } else { 0..0 },
                shared,
            };
            self.entries.insert(id, entry);
        }
    }

    /// Gives the next waiting sequence a place, and what is published of its tokens.
    pub(super) fn admit(&mut self, sequences: &impl Sequences) -> Option<Admitted> {
        let rank = *self.waiting.iter().find(|rank| sequences.readiness(rank.1) == Readiness::Ready)?;
        while self.running.len() >= self.limits.max_running {
            self.preempt_stalled(sequences)?;
        }
        let entry = self.entries.get(&rank.1)?;
        let (length, salt) = (entry.length, entry.salt);
        let reusable = sequences.reusable(rank.1).min(length.saturating_sub(1));
        loop {
            let prefix = salt.map(|salt| self.pool.find(salt, sequences.tokens(rank.1).get(..reusable).unwrap_or_default()));
            let (found, idle) = prefix.as_ref().map_or((0, 0), |prefix| (prefix.blocks.len(), prefix.idle));
            let needed = idle + self.pool.shape().blocks_for(length).saturating_sub(found) + self.promised();
            if needed <= self.pool.available() || self.running.is_empty() {
                let entry = self.entries.get_mut(&rank.1)?;
                if let Some(prefix) = prefix {
                    prefix.blocks.iter().for_each(|&id| self.pool.hold(id));
                    (entry.published, entry.parent) = (prefix.blocks.len(), Some(prefix.end));
                    entry.computed = prefix.blocks.len() * self.pool.shape().block_tokens;
                    entry.blocks = prefix.blocks;
                }
                entry.place = Place::Running;
                let reused = entry.computed;
                self.waiting.remove(&rank);
                self.running.insert(rank);
                self.release_followers(rank.1);
                return Some(Admitted { id: rank.1, reusable, reused });
            }
            self.preempt_stalled(sequences)?;
        }
    }

    /// Blocks that running sequences will still need for the tokens that are known of them, and one more for each to grow.
    fn promised(&self) -> usize {
        let missing = |rank: &Rank| {
            let entry = self.entries.get(&rank.1)?;
            Some(1 + self.pool.shape().blocks_for(entry.length).saturating_sub(entry.blocks.len()))
        };
        self.running.iter().filter_map(missing).sum()
    }

    /// Takes the place of the worst ranked sequence that has been behind for long.
    fn preempt_stalled(&mut self, sequences: &impl Sequences) -> Option<()> {
        let victim = *self.running.iter().rev().find(|rank| sequences.readiness(rank.1) == Readiness::Stalled)?;
        self.preempt(victim);
        Some(())
    }

    fn preempt(&mut self, rank: Rank) {
        let Some(entry) = self.entries.get_mut(&rank.1) else { return };
        entry.place = Place::Waiting;
        (entry.computed, entry.published, entry.parent) = (0, 0, None);
        entry.blocks.drain(..).rev().for_each(|id| self.pool.release(id));
        self.running.remove(&rank);
        self.waiting.insert(rank);
        self.preempted.push(rank.1);
    }

    /// What was computed of a sequence is of no use to it any more: it is computed again, and shared under `salt` from now on. One that
    /// runs goes back to its place in the queue.
    pub(super) fn restart(&mut self, id: SequenceId, salt: Option<Salt>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.salt = salt;
        let (rank, place) = (entry.rank, entry.place);
        if place == Place::Running {
            self.preempt(rank);
        }
    }

    /// Forgets a sequence, wherever it is, and releases its blocks.
    pub(super) fn remove(&mut self, id: SequenceId) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        entry.blocks.drain(..).rev().for_each(|id| self.pool.release(id));
        self.running.remove(&entry.rank);
        self.waiting.remove(&entry.rank);
        // The next choice computes the prompt in its stead.
        let mut heirs = entry.followers.clone();
        if let Some(heir) = heirs.find(|heir| self.entries.contains_key(heir))
            && let Some(first) = self.entries.get_mut(&heir)
        {
            first.place = Place::Waiting;
            first.followers = heirs;
            self.waiting.insert(first.rank);
        }
    }

    /// Divides the next step into `shares`, best rank first. Empty if and only if no running sequence is ready.
    pub(super) fn plan(&mut self, sequences: &impl Sequences, shares: &mut Vec<Share>) {
        shares.clear();
        let (mut decoding, mut prefilling) = (std::mem::take(&mut self.decoding), std::mem::take(&mut self.prefilling));
        decoding.clear();
        prefilling.clear();
        for &rank in &self.running {
            let tokens = self.entries.get(&rank.1).map_or(0, |entry| entry.length.saturating_sub(entry.computed));
            if tokens == 0 || sequences.readiness(rank.1) != Readiness::Ready {
                continue;
            }
            if tokens == 1 { &mut decoding } else { &mut prefilling }.push(Wish { rank, tokens });
        }
        let best = decoding.first().into_iter().chain(prefilling.first()).min_by_key(|wish| wish.rank).copied();
        self.divide(&mut decoding, &mut prefilling);
        decoding.append(&mut prefilling);
        // In order of rank, so that whoever is preempted had no share yet.
        decoding.sort_unstable_by_key(|wish| wish.rank);
        for &wish in &decoding {
            shares.extend(self.secure(wish, sequences));
        }
        if let Some(best) = best.filter(|_| shares.is_empty()) {
            let tokens = best.tokens.min(self.limits.max_step_tokens);
            shares.extend(self.secure(Wish { tokens, ..best }, sequences));
        }
        (self.decoding, self.prefilling) = (decoding, prefilling);
    }

    /// Cuts the wishes down to the budget of a step.
    fn divide(&mut self, decoding: &mut Vec<Wish>, prefilling: &mut Vec<Wish>) {
        let mut budget = self.limits.max_step_tokens;
        if decoding.len() > budget {
            decoding.sort_unstable_by_key(|wish| wish.rank.1);
            let turn = decoding.partition_point(|wish| wish.rank.1 <= self.last_turn);
            decoding.rotate_left(turn);
            decoding.truncate(budget);
            self.last_turn = decoding.last().map_or(0, |wish| wish.rank.1);
        }
        budget -= decoding.len();
        let mut grants = 0;
        if let Some((first, others)) = prefilling.split_first_mut() {
            let wanted = first.tokens;
            first.tokens = wanted.min(budget.div_ceil(2));
            let mut left = budget - first.tokens;
            others.sort_unstable_by_key(|wish| (wish.tokens, wish.rank));
            for wish in others {
                wish.tokens = wish.tokens.min(left);
                left -= wish.tokens;
                grants += usize::from(wish.tokens > 0);
            }
            first.tokens += left.min(wanted - first.tokens);
            grants += usize::from(first.tokens > 0);
        }
        prefilling.truncate(grants);
    }

    /// Gives a running sequence the blocks for its wish; fewer tokens if they cannot be had, `None` if not even one.
    fn secure(&mut self, wish: Wish, sequences: &impl Sequences) -> Option<Share> {
        let Wish { rank, mut tokens } = wish;
        let (block_tokens, past) =
            (self.pool.shape().block_tokens, self.entries.get(&rank.1).filter(|e| e.place == Place::Running)?.computed);
        let wanted = self.pool.shape().blocks_for(past + tokens);
        loop {
            let entry = self.entries.get_mut(&rank.1)?;
            if entry.blocks.len() >= wanted {
                break;
            }
            if let Some(block) = self.pool.allocate() {
                entry.blocks.push(block);
                continue;
            }
            let had = entry.blocks.len();
            let holds = |other: &&Rank| self.entries.get(&other.1).is_some_and(|entry| !entry.blocks.is_empty());
            let others = || self.running.iter().rev().filter(|other| **other != rank).filter(holds);
            let behind = others().find(|other| sequences.readiness(other.1) != Readiness::Ready);
            match behind.or_else(|| others().next().filter(|other| **other > rank)).copied() {
                Some(victim) => self.preempt(victim),
                None => {
                    tokens = (had * block_tokens).saturating_sub(past);
                    break;
                }
            }
        }
        (tokens > 0).then_some(Share { id: rank.1, past, tokens })
    }

    /// The blocks of a running sequence for its first `tokens` tokens.
    pub(super) fn table(&self, id: SequenceId, tokens: usize) -> &[BlockId] {
        let blocks = self.pool.shape().blocks_for(tokens);
        self.entries.get(&id).and_then(|entry| entry.blocks.get(..blocks)).unwrap_or_default()
    }

    /// A share has been computed. `tokens` are all that are known of the sequence now.
    pub(super) fn computed(&mut self, share: Share, tokens: &[u32]) {
        let Some(entry) = self.entries.get_mut(&share.id) else { return };
        entry.computed = share.past + share.tokens;
        entry.length = tokens.len();
        let block_tokens = self.pool.shape().block_tokens;
        while let Some(parent) = entry.parent
            && entry.published < entry.computed / block_tokens
            && let Some(&block) = entry.blocks.get(entry.published)
            && let Some(part) = tokens.get(entry.published * block_tokens..(entry.published + 1) * block_tokens)
        {
            entry.parent = self.pool.publish(block, parent, part);
            entry.published += 1;
        }
        self.release_followers(share.id);
    }

    /// From now on blocks of a sequence become nobody else's: what is in them may be no numbers.
    pub(super) fn keep_private(&mut self, id: SequenceId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.parent = None;
        }
    }

    /// Lets the other choices of a request go once the first has computed what they share.
    fn release_followers(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.computed >= entry.shared) else { return };
        for follower in std::mem::take(&mut entry.followers) {
            if let Some(follower) = self.entries.get_mut(&follower) {
                follower.place = Place::Waiting;
                self.waiting.insert(follower.rank);
            }
        }
    }
}

/// At most 94 bits of them.
fn nanos(duration: Duration) -> i128 {
    duration.as_nanos() as i128
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::{
        super::blocks::{ChoiceKey, RoutingKey},
        *,
    };

    const SALT: Salt = Salt::Common { generation: 1, routing: RoutingKey::Same(ChoiceKey::Native) };

    fn private(request: u64, generation: u64) -> Salt {
        Salt::Private { request, generation }
    }

    /// The same for a later generation.
    fn later(salt: Salt) -> Salt {
        match salt {
            Salt::Common { generation, routing } => Salt::Common { generation: generation + 10, routing },
            Salt::Private { request, generation } => private(request, generation + 10),
        }
    }

    /// A sequence as its owner knows it.
    #[derive(Clone, Debug)]
    struct Known {
        tokens: Vec<u32>,
        readiness: Readiness,
    }

    impl Sequences for HashMap<SequenceId, Known> {
        fn readiness(&self, id: SequenceId) -> Readiness {
            self[&id].readiness
        }

        fn tokens(&self, id: SequenceId) -> &[u32] {
            &self[&id].tokens
        }

        fn reusable(&self, id: SequenceId) -> usize {
            self[&id].tokens.len() - 1
        }
    }

    struct Setup {
        scheduler: Scheduler,
        known: HashMap<SequenceId, Known>,
        next: SequenceId,
    }

    impl Setup {
        fn new(max_running: usize, max_step_tokens: usize, num_blocks: usize) -> Self {
            let limits = Limits { max_running, max_step_tokens, priority_step: Duration::from_secs(10) };
            let scheduler = Scheduler::new(limits, CacheShape { block_tokens: 4, num_blocks });
            Self { scheduler, known: HashMap::new(), next: 1 }
        }

        fn arrive(&mut self, at: u64, priority: i32, tokens: &[u32], choices: u64, salt: Option<Salt>) -> SequenceId {
            let ids = self.next..self.next + choices;
            self.next = ids.end;
            for id in ids.clone() {
                self.known.insert(id, Known { tokens: tokens.to_vec(), readiness: Readiness::Ready });
            }
            let first = ids.start;
            self.scheduler.enqueue(&Arrival { ids, at: Duration::from_secs(at), priority, tokens: tokens.len(), salt });
            first
        }

        fn admit(&mut self) -> Vec<SequenceId> {
            std::iter::from_fn(|| self.scheduler.admit(&self.known).map(|admitted| admitted.id)).collect()
        }

        fn plan(&mut self) -> Vec<Share> {
            let mut shares = Vec::new();
            self.scheduler.plan(&self.known, &mut shares);
            shares
        }

        /// A step in which everything that is read to its end gets a token `next`.
        fn step(&mut self, next: u32) -> Vec<(SequenceId, usize)> {
            let shares = self.plan();
            for &share in &shares {
                let tokens = &mut self.known.get_mut(&share.id).unwrap().tokens;
                if share.past + share.tokens == tokens.len() {
                    tokens.push(next);
                }
                self.scheduler.computed(share, tokens);
            }
            shares.iter().map(|share| (share.id, share.tokens)).collect()
        }

        fn check(&self) {
            let tables: Vec<&[BlockId]> = self.scheduler.entries.values().map(|entry| &entry.blocks[..]).collect();
            self.scheduler.pool.check(&tables);
        }
    }

    #[test]
    fn decodes_come_first_then_the_oldest_and_the_shortest_prefills() {
        let mut setup = Setup::new(8, 11, 100);
        setup.arrive(0, 0, &[1], 1, None);
        assert_eq!(setup.admit(), [1]);
        assert_eq!(setup.step(7), [(1, 1)]);
        for tokens in [30, 20, 3, 9] {
            setup.arrive(1, 0, &vec![1; tokens], 1, None);
        }
        assert_eq!(setup.admit(), [2, 3, 4, 5]);
        assert_eq!(setup.step(7), [(1, 1), (2, 5), (4, 3), (5, 2)]);
        assert_eq!(setup.step(7), [(1, 1), (2, 5), (4, 1), (5, 4)]);
        assert_eq!(setup.step(7), [(1, 1), (2, 5), (3, 1), (4, 1), (5, 3)], "the budget is used up");
    }

    #[test]
    fn decodes_take_turns_when_the_budget_is_short() {
        let mut setup = Setup::new(5, 2, 100);
        for _ in 0..5 {
            setup.arrive(0, 0, &[1], 1, None);
        }
        setup.admit();
        let seen: Vec<SequenceId> = (0..5).flat_map(|_| setup.step(7)).map(|(id, _)| id).collect();
        assert_eq!(seen, [1, 2, 3, 4, 1, 5, 2, 3, 4, 5]);
    }

    #[test]
    fn priority_is_a_head_start() {
        let mut setup = Setup::new(1, 8, 100);
        setup.arrive(0, 0, &[1], 1, None);
        setup.arrive(15, 1, &[1], 1, None);
        setup.arrive(15, 2, &[1], 1, None);
        setup.arrive(16, -1, &[1], 1, None);
        setup.arrive(2000, i32::MAX, &[1], 1, None);
        let mut order = Vec::new();
        while let Some(&id) = setup.admit().first() {
            order.push(id);
            setup.scheduler.remove(id);
        }
        assert_eq!(order, [3, 1, 2, 4, 5]);
    }

    #[test]
    fn admission_waits_for_blocks_in_order() {
        let mut setup = Setup::new(8, 100, 10);
        setup.arrive(0, 0, &[1; 20], 1, None);
        setup.arrive(0, 0, &[2; 20], 1, None);
        setup.arrive(0, 0, &[3; 1], 1, None);
        assert_eq!(setup.admit(), [1], "5 blocks, 1 to grow and 5 are more than 10; the third is behind the second");
        setup.step(7);
        setup.scheduler.remove(1);
        assert_eq!(setup.admit(), [2, 3]);
        setup.check();
    }

    #[test]
    fn a_published_prefix_is_not_computed_again() {
        let mut setup = Setup::new(8, 100, 20);
        let prompt: Vec<u32> = (0..10).collect();
        setup.arrive(0, 0, &prompt, 1, Some(SALT));
        setup.admit();
        setup.step(10);
        assert_eq!(setup.step(11), [(1, 1)], "token 10");
        assert_eq!(setup.step(12), [(1, 1)], "token 11, which completes the third block");
        setup.arrive(0, 0, &(0..13).collect::<Vec<_>>(), 1, Some(SALT));
        setup.arrive(0, 0, &(0..8).collect::<Vec<_>>(), 1, Some(SALT));
        setup.arrive(0, 0, &prompt, 1, Some(private(1, 1)));
        let admitted: Vec<Admitted> = std::iter::from_fn(|| setup.scheduler.admit(&setup.known)).collect();
        let expected = [(2, 12, 12), (3, 7, 4), (4, 9, 0)].map(|(id, reusable, reused)| Admitted { id, reusable, reused });
        assert_eq!(admitted, expected);
        assert_eq!(setup.step(7)[1..], [(2, 1), (3, 4), (4, 10)]);
        setup.check();
    }

    #[test]
    fn what_is_kept_private_is_computed_again() {
        let mut setup = Setup::new(8, 100, 20);
        let prompt: Vec<u32> = (0..10).collect();
        setup.arrive(0, 0, &prompt, 1, Some(SALT));
        setup.admit();
        setup.scheduler.keep_private(1);
        setup.step(10);
        setup.arrive(0, 0, &prompt, 1, Some(SALT));
        assert_eq!(setup.scheduler.admit(&setup.known).map(|admitted| admitted.reused), Some(0));
        setup.check();
    }

    #[test]
    fn the_choices_of_a_request_share_its_prompt() {
        let mut setup = Setup::new(8, 6, 20);
        setup.arrive(0, 0, &[5; 10], 3, Some(private(1, 1)));
        assert_eq!(setup.admit(), [1], "the others wait for the first");
        assert_eq!(setup.step(7), [(1, 6)]);
        assert!(setup.admit().is_empty());
        assert_eq!(setup.step(7), [(1, 4)]);
        assert_eq!(setup.admit(), [2, 3]);
        assert_eq!(setup.step(8), [(1, 1), (2, 2), (3, 2)]);
        assert_eq!(setup.scheduler.pool().held(), 5, "two blocks for all, and one for each");
        setup.check();
    }

    #[test]
    fn a_choice_that_goes_leaves_the_prompt_to_the_next() {
        let mut setup = Setup::new(8, 6, 20);
        setup.arrive(0, 0, &[5; 10], 3, Some(private(1, 1)));
        setup.admit();
        setup.step(7);
        setup.scheduler.remove(1);
        assert_eq!(setup.admit(), [2]);
        assert_eq!(setup.step(7), [(2, 6)], "the block that the first had computed is found");
        assert_eq!(setup.admit(), [3]);
    }

    #[test]
    fn the_worst_rank_is_preempted_and_recomputed() {
        let mut setup = Setup::new(8, 100, 6);
        for id in 1..=2 {
            setup.arrive(0, 0, &[id; 7], 1, None);
        }
        assert_eq!(setup.admit(), [1, 2]);
        setup.step(7);
        while setup.scheduler.preempted.is_empty() {
            setup.step(7);
            setup.check();
        }
        assert_eq!(setup.scheduler.take_preempted(), [2]);
        assert_eq!(setup.known[&2].tokens.len(), 13, "12 tokens fill 3 blocks; the first got the next one");
        assert!(setup.admit().is_empty(), "its blocks do not fit beside the first");
        setup.scheduler.remove(1);
        assert_eq!(setup.admit(), [2]);
        assert_eq!(setup.step(7), [(2, 13)]);
    }

    #[test]
    fn readers_that_are_behind_lose_their_blocks_first_and_later_their_place() {
        let mut setup = Setup::new(2, 100, 6);
        setup.arrive(0, 0, &[1; 11], 1, None);
        setup.arrive(1, 0, &[2; 7], 1, None);
        assert_eq!(setup.admit(), [1, 2]);
        setup.step(7);
        setup.known.get_mut(&1).unwrap().readiness = Readiness::Paused;
        while setup.scheduler.preempted.is_empty() {
            assert_eq!(setup.step(7), [(2, 1)]);
        }
        assert_eq!(setup.scheduler.take_preempted(), [1]);
        assert!(setup.admit().is_empty(), "it does not come back before its reader does");
        setup.known.get_mut(&2).unwrap().readiness = Readiness::Paused;
        setup.arrive(2, 0, &[3; 1], 1, None);
        setup.arrive(2, 0, &[4; 1], 1, None);
        assert_eq!((setup.admit(), setup.plan().len()), (vec![3], 1));
        setup.known.get_mut(&2).unwrap().readiness = Readiness::Stalled;
        assert_eq!(setup.admit(), [4]);
        assert_eq!(setup.scheduler.take_preempted(), [2]);
        setup.check();
    }

    /// The only block is held by one that waits for budget, which another takes that cannot have a block.
    #[test]
    fn somebody_always_advances() {
        let mut setup = Setup::new(3, 1, 3);
        setup.arrive(0, 0, &[1; 7], 1, None);
        assert_eq!(setup.admit(), [1]);
        assert_eq!(setup.step(7), [(1, 1)]);
        setup.arrive(1, 0, &[2; 1], 1, None);
        setup.scheduler.limits.max_running = 3;
        while !setup.known[&1].tokens.ends_with(&[7; 4]) {
            setup.admit();
            assert!(!setup.step(7).is_empty());
            setup.check();
        }
    }

    #[test]
    fn what_is_restarted_knows_nothing_of_before() {
        let mut setup = Setup::new(8, 100, 40);
        setup.arrive(0, 0, &[5; 10], 1, Some(SALT));
        setup.arrive(0, 0, &[5; 10], 3, Some(private(2, 1)));
        assert_eq!(setup.admit(), [1, 2]);
        setup.step(7);
        assert_eq!(setup.admit(), [3, 4]);
        setup.step(8);
        setup.arrive(1, 0, &[6; 4], 1, Some(SALT));
        for id in 1..=5 {
            let salt = setup.scheduler.entries[&id].salt.map(later);
            setup.scheduler.restart(id, salt);
        }
        assert_eq!(setup.scheduler.take_preempted(), [1, 2, 3, 4], "the last had no place to lose");
        assert_eq!(setup.scheduler.pool().held(), 0);
        let admitted: Vec<Admitted> = std::iter::from_fn(|| setup.scheduler.admit(&setup.known)).collect();
        assert!(admitted.len() == 5 && admitted.iter().all(|admitted| admitted.reused == 0), "{admitted:?}");
        assert_eq!(setup.step(9), [(1, 12), (2, 12), (3, 11), (4, 11), (5, 4)], "all tokens, said ones too");
        setup.arrive(1, 0, &[5; 10], 1, Some(SALT));
        assert_eq!(
            setup.scheduler.admit(&setup.known).map(|admitted| admitted.reused),
            Some(8),
            "the old prefix is there for the old salt"
        );
        setup.check();
    }

    /// What stands for the keys and values of one position: everything they depend on.
    type Truth = HashMap<(BlockId, usize), (Option<Salt>, Vec<u32>)>;

    /// Random arrivals, lengths, priorities, choices, slow readers, cancellations and restarts. No block is written by two, what is read
    /// was computed from the same history under the same salt, budgets hold, somebody advances, and everything ends and leaves nothing.
    #[test]
    fn random_loads_all_end() {
        let (mut preempted, mut reused) = (0, 0);
        for seed in 0..150 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (max_running, budget, blocks) = (rng.random_range(1..=6), rng.random_range(1..=24), rng.random_range(6..=30));
            let mut setup = Setup::new(max_running, budget, blocks);
            let mut goal: HashMap<SequenceId, usize> = HashMap::new();
            let mut salts: HashMap<SequenceId, Option<Salt>> = HashMap::new();
            let mut truth = Truth::new();
            let mut step = 0;
            loop {
                step += 1;
                if step < 150 && rng.random_bool(0.4) {
                    let prompt: Vec<u32> = (0..rng.random_range(1..14)).map(|_| rng.random_range(0..2)).collect();
                    let salt = match rng.random_range(0..4) {
                        0 => None,
                        1 => Some(private(setup.next, 1)),
                        n => Some(Salt::Common { generation: n, routing: RoutingKey::Same(ChoiceKey::Native) }),
                    };
                    let choices = if rng.random_bool(0.2) { rng.random_range(2..5) } else { 1 };
                    let first = setup.arrive(step, rng.random_range(-1..=1), &prompt, choices, salt);
                    for id in first..first + choices {
                        // The last token is never computed: at most 24 are, in 6 blocks.
                        goal.insert(id, prompt.len() + rng.random_range(1..=11));
                        salts.insert(id, salt);
                    }
                }
                if let Some(&id) = goal.keys().min().filter(|_| rng.random_bool(0.04)) {
                    setup.scheduler.remove(id);
                    goal.remove(&id);
                }
                if let Some(&id) = goal.keys().max().filter(|_| step < 150 && rng.random_bool(0.04)) {
                    let salt = salts[&id].map(later);
                    setup.scheduler.restart(id, salt);
                    salts.insert(id, salt);
                }
                for (&id, known) in &mut setup.known {
                    let started = goal.get(&id).is_some_and(|_| setup.scheduler.entries[&id].computed > 0);
                    let behind = step < 150 && started && rng.random_bool(0.2);
                    known.readiness = match behind {
                        false => Readiness::Ready,
                        true if rng.random() => Readiness::Paused,
                        true => Readiness::Stalled,
                    };
                }
                while let Some(admitted) = setup.scheduler.admit(&setup.known) {
                    assert!(admitted.reused <= admitted.reusable && admitted.reused % 4 == 0);
                    reused += admitted.reused;
                }
                let running: Vec<SequenceId> = setup.scheduler.running.iter().map(|rank| rank.1).collect();
                let ready = running.iter().any(|id| setup.known[id].readiness == Readiness::Ready);
                assert!(running.len() <= max_running && (goal.is_empty() || !running.is_empty() || step < 150));
                let shares = setup.plan();
                preempted += setup.scheduler.take_preempted().len();
                setup.check();
                assert_eq!(ready, !shares.is_empty(), "somebody advances");
                assert!(shares.iter().map(|share| share.tokens).sum::<usize>() <= budget);
                assert_eq!(shares.iter().map(|share| share.id).collect::<HashSet<_>>().len(), shares.len());
                let mut written = HashSet::new();
                for share in &shares {
                    let (tokens, salt) = (&setup.known[&share.id].tokens, salts[&share.id]);
                    assert!(share.tokens > 0 && share.past + share.tokens <= tokens.len());
                    let table = setup.scheduler.table(share.id, share.past + share.tokens).to_vec();
                    for position in 0..share.past + share.tokens {
                        let place = (table[position / 4], position % 4);
                        let history = (salt, tokens[..=position].to_vec());
                        if position >= share.past {
                            assert!(written.insert(place), "a block of two");
                            truth.insert(place, history);
                        } else {
                            assert!(!written.contains(&place));
                            assert_eq!(truth[&place], history, "another history");
                        }
                    }
                }
                for share in shares {
                    assert_eq!(setup.known[&share.id].readiness, Readiness::Ready);
                    let tokens = &mut setup.known.get_mut(&share.id).unwrap().tokens;
                    if share.past + share.tokens == tokens.len() {
                        tokens.push(rng.random_range(0..2));
                    }
                    setup.scheduler.computed(share, tokens);
                    if tokens.len() == goal[&share.id] {
                        setup.scheduler.remove(share.id);
                        goal.remove(&share.id);
                    }
                }
                setup.check();
                if step >= 150 && goal.is_empty() {
                    break;
                }
                assert!(step < 150 + 5000, "starved: {goal:?}");
            }
            assert!(setup.scheduler.entries.is_empty() && setup.scheduler.waiting.is_empty() && setup.scheduler.running.is_empty());
            assert_eq!(setup.scheduler.pool().held(), 0);
        }
        assert!(preempted > 100 && reused > 1000, "{preempted} preempted, {reused} tokens reused");
    }
}
