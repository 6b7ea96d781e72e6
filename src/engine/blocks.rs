//! The blocks of the cache: who holds which, and which hold a prefix that others may use. Pure bookkeeping.
//!
//! A block is free, held by one or more sequences, or idle: held by nobody, but it still contains the keys and values of known
//! tokens. Idle blocks are the first reserve when free ones run out, the least recently used first.
//!
//! A full block that has been computed can be published. It is then found again by what its content depends on: the chain of all tokens
//! before it, its own tokens, and a [`Salt`], which is the weights and the routing. The hash of that is only a way to find a candidate;
//! parent and tokens are compared, so that a collision is a miss and never a wrong prefix.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
};

use crate::{
    model::CacheShape,
    moe::policy::{LayerChoices, RoutingChoice, WeightForm},
};

/// Names a block of the cache.
pub(super) type BlockId = u32;

/// No block.
const NONE: BlockId = BlockId::MAX;

/// What keys and values depend on besides tokens and positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Salt {
    /// Usable by all requests under these weights and this routing.
    Common { generation: u64, routing: RoutingKey },
    /// Usable by the choices of one request only, as long as they are of one generation.
    Private { request: u64, generation: u64 },
}

/// A routing that can be compared exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RoutingKey {
    Same(ChoiceKey),
    /// Another for each layer: the number of the list in [`RoutingKeys`].
    Each(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ChoiceKey {
    Native,
    TopK {
        k: usize,
        weight_form: Option<WeightForm>,
    },
    Mass {
        /// Its bits.
        threshold: u32,
        max_k: Option<usize>,
        weight_form: Option<WeightForm>,
    },
    /// The bits of the temperature.
    Soft(Option<u32>),
}

/// Numbers of lists of routings. A client can think of any number of lists: for a new one that has no place the one that was not asked for
/// for the longest time is forgotten. Numbers are not used twice, so what was published under a forgotten one is never found again.
#[derive(Debug, Default)]
pub(super) struct RoutingKeys {
    lists: HashMap<Vec<ChoiceKey>, KnownList>,
    /// Lists that were asked for so far, with repetitions.
    asked: u64,
}

#[derive(Clone, Copy, Debug)]
struct KnownList {
    number: u64,
    /// What [`RoutingKeys::asked`] was when it was asked for last.
    last_asked: u64,
}

/// Lists in [`RoutingKeys`].
const MAX_LISTS: usize = 1024;

impl RoutingKeys {
    /// `None` for what is not to be compared.
    pub(super) fn key(&mut self, routing: &LayerChoices) -> Option<RoutingKey> {
        match routing {
            LayerChoices::Same(choice) => Some(RoutingKey::Same((*choice).into())),
            LayerChoices::Each(choices) => Some(RoutingKey::Each(self.number(choices.iter().map(|&choice| choice.into()).collect()))),
            LayerChoices::Replay { .. } => None,
        }
    }

    fn number(&mut self, list: Vec<ChoiceKey>) -> u64 {
        self.asked += 1;
        if self.lists.len() >= MAX_LISTS && !self.lists.contains_key(&list) {
            let oldest = self.lists.values().map(|known| known.last_asked).min();
            self.lists.retain(|_, known| Some(known.last_asked) != oldest);
        }
        let known = self.lists.entry(list).or_insert(KnownList { number: self.asked, last_asked: 0 });
        known.last_asked = self.asked;
        known.number
    }
}

/// What comes before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// Nothing.
    Root(Salt),
    /// A published content. Numbers are not used twice, so the children of a content that was dropped are never found again.
    Content(u64),
}

/// Content by which a block can be found.
#[derive(Debug)]
struct Content {
    number: u64,
    hash: u64,
    parent: Parent,
    tokens: Box<[u32]>,
}

#[derive(Debug)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    content: Option<Content>,
    /// Neighbours among the idle blocks.
    older: BlockId,
    newer: BlockId,
}

/// Finds candidates; a test has one that always collides.
type Hasher = Box<dyn Fn(Parent, &[u32]) -> u64 + Send>;

/// All blocks of one cache.
pub(super) struct BlockPool {
    shape: CacheShape,
    /// Blocks that were ever used: all above are free, and cost nothing.
    blocks: Vec<Block>,
    /// Used once, and free again.
    free: Vec<BlockId>,
    oldest_idle: BlockId,
    newest_idle: BlockId,
    idle: usize,
    held: usize,
    /// Published contents by hash.
    found: HashMap<u64, BlockId>,
    last_number: u64,
    hasher: Hasher,
}

/// A published prefix.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) blocks: Vec<BlockId>,
    /// Those of them that nobody holds.
    pub(super) idle: usize,
    /// What comes before the next block.
    pub(super) end: Parent,
}

impl From<RoutingChoice> for ChoiceKey {
    fn from(choice: RoutingChoice) -> Self {
        match choice {
            RoutingChoice::Native => Self::Native,
            RoutingChoice::TopK { k, weight_form } => Self::TopK { k, weight_form },
            RoutingChoice::Mass { threshold, max_k, weight_form } => Self::Mass { threshold: threshold.to_bits(), max_k, weight_form },
            RoutingChoice::Soft { temperature } => Self::Soft(temperature.map(f32::to_bits)),
        }
    }
}

impl BlockPool {
    /// A pool whose blocks are all free.
    pub(super) fn new(shape: CacheShape) -> Self {
        let state = RandomState::new();
        Self::with_hasher(shape, Box::new(move |parent, tokens| state.hash_one((parent, tokens))))
    }

    fn with_hasher(shape: CacheShape, hasher: Hasher) -> Self {
        Self {
            shape,
            blocks: Vec::new(),
            free: Vec::new(),
            oldest_idle: NONE,
            newest_idle: NONE,
            idle: 0,
            held: 0,
            found: HashMap::new(),
            last_number: 0,
            hasher,
        }
    }

    /// Its size.
    pub(super) fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Blocks that can be had now.
    pub(super) fn available(&self) -> usize {
        self.shape.num_blocks - self.held
    }

    /// Blocks that somebody holds.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// A block for one holder: a free one, else the one that was idle longest, which then is forgotten.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let id = if let Some(id) = self.free.pop() {
            id
        } else if self.blocks.len() < self.shape.num_blocks {
            self.blocks.push(Block { holders: 0, content: None, older: NONE, newer: NONE });
            (self.blocks.len() - 1) as BlockId
        } else if self.oldest_idle != NONE {
            let id = self.oldest_idle;
            self.unlink(id);
            self.forget(id);
            id
        } else {
            return None;
        };
        self.blocks[id as usize].holders = 1;
        self.held += 1;
        Some(id)
    }

    /// One more holder for a block that is held or idle.
    pub(super) fn hold(&mut self, id: BlockId) {
        if self.blocks[id as usize].holders == 0 {
            self.unlink(id);
            self.held += 1;
        }
        self.blocks[id as usize].holders += 1;
    }

    /// One holder less. The blocks of a sequence are released last to first, so that a chain is forgotten from its end.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0, "block {id} is released too often");
        block.holders = block.holders.saturating_sub(1);
        if block.holders > 0 {
            return;
        }
        self.held -= 1;
        if block.content.is_some() {
            self.link(id);
        } else {
            self.free.push(id);
        }
    }

    /// The longest published chain of full blocks at the start of `tokens`. It is not held yet.
    pub(super) fn find(&self, salt: Salt, tokens: &[u32]) -> Prefix {
        let mut prefix = Prefix { blocks: Vec::new(), idle: 0, end: Parent::Root(salt) };
        for part in tokens.chunks_exact(self.shape.block_tokens) {
            let Some((id, number)) = self.look_up(prefix.end, part) else { break };
            prefix.idle += usize::from(self.blocks[id as usize].holders == 0);
            prefix.blocks.push(id);
            prefix.end = Parent::Content(number);
        }
        prefix
    }

    fn look_up(&self, parent: Parent, tokens: &[u32]) -> Option<(BlockId, u64)> {
        let &id = self.found.get(&(self.hasher)(parent, tokens))?;
        let content = self.blocks[id as usize].content.as_ref()?;
        (content.parent == parent && *content.tokens == *tokens).then_some((id, content.number))
    }

    /// Lets others find a held block that contains `tokens` after `parent`, completely computed. Returns what comes before the next
    /// block: if the same content is published already, that.
    pub(super) fn publish(&mut self, id: BlockId, parent: Parent, tokens: &[u32]) -> Option<Parent> {
        if let Some((_, number)) = self.look_up(parent, tokens) {
            return Some(Parent::Content(number));
        }
        let hash = (self.hasher)(parent, tokens);
        let Entry::Vacant(place) = self.found.entry(hash) else { return None };
        place.insert(id);
        self.last_number += 1;
        self.blocks[id as usize].content = Some(Content { number: self.last_number, hash, parent, tokens: tokens.into() });
        Some(Parent::Content(self.last_number))
    }

    /// Forgets all contents: nothing that was computed until now is found again.
    pub(super) fn forget_all(&mut self) {
        while self.oldest_idle != NONE {
            let id = self.oldest_idle;
            self.unlink(id);
            self.free.push(id);
        }
        self.found.clear();
        self.blocks.iter_mut().for_each(|block| block.content = None);
    }

    fn forget(&mut self, id: BlockId) {
        if let Some(content) = self.blocks[id as usize].content.take() {
            self.found.remove(&content.hash);
        }
    }

    /// Makes it the newest idle block.
    fn link(&mut self, id: BlockId) {
        let newest = self.newest_idle;
        match self.blocks.get_mut(newest as usize) {
            Some(block) => block.newer = id,
            None => self.oldest_idle = id,
        }
        let block = &mut self.blocks[id as usize];
        (block.older, block.newer) = (newest, NONE);
        self.newest_idle = id;
        self.idle += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { older, newer, .. } = self.blocks[id as usize];
        match self.blocks.get_mut(older as usize) {
            Some(block) => block.newer = newer,
            None => self.oldest_idle = newer,
        }
        match self.blocks.get_mut(newer as usize) {
            Some(block) => block.older = older,
            None => self.newest_idle = older,
        }
        self.idle -= 1;
    }

    /// Every block is in exactly one state, and counted there. `tables` are all that hold blocks.
    #[cfg(test)]
    pub(super) fn check(&self, tables: &[&[BlockId]]) {
        let mut holders = vec![0u32; self.blocks.len()];
        tables.iter().flat_map(|table| table.iter()).for_each(|&id| holders[id as usize] += 1);
        assert_eq!(self.blocks.iter().map(|block| block.holders).collect::<Vec<_>>(), holders);
        assert_eq!(self.held, holders.iter().filter(|&&holders| holders > 0).count());
        assert_eq!(self.held + self.idle + self.free.len(), self.blocks.len());
        assert!(self.blocks.len() <= self.shape.num_blocks);
        let (mut id, mut idle, mut before) = (self.oldest_idle, 0, NONE);
        while id != NONE {
            let block = &self.blocks[id as usize];
            assert!(block.holders == 0 && block.content.is_some() && block.older == before);
            (before, id, idle) = (id, block.newer, idle + 1);
        }
        assert_eq!((self.newest_idle, self.idle), (before, idle));
        assert!(self.free.iter().all(|&id| self.blocks[id as usize].holders == 0 && self.blocks[id as usize].content.is_none()));
        let published = self.blocks.iter().filter(|block| block.content.is_some()).count();
        assert_eq!(self.found.len(), published);
        assert!(self.found.iter().all(|(&hash, &id)| self.blocks[id as usize].content.as_ref().is_some_and(|c| c.hash == hash)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    const SALT: Salt = Salt::Common { generation: 1, routing: RoutingKey::Same(ChoiceKey::Native) };

    fn pool(num_blocks: usize) -> BlockPool {
        BlockPool::new(CacheShape { block_tokens: 2, num_blocks })
    }

    /// Computes `tokens` with a new table, and publishes its full blocks.
    fn compute(pool: &mut BlockPool, salt: Salt, tokens: &[u32]) -> Vec<BlockId> {
        let mut parent = Some(Parent::Root(salt));
        let blocks = tokens.chunks(2).map(|part| {
            let id = pool.allocate().unwrap();
            if part.len() == 2 {
                parent = parent.and_then(|parent| pool.publish(id, parent, part));
            }
            id
        });
        blocks.collect()
    }

    fn release(pool: &mut BlockPool, table: &[BlockId]) {
        table.iter().rev().for_each(|&id| pool.release(id));
    }

    #[test]
    fn a_published_prefix_is_found_in_whole_blocks() {
        let mut pool = pool(8);
        let table = compute(&mut pool, SALT, &[1, 2, 3, 4, 5]);
        assert_eq!(pool.find(SALT, &[1, 2, 3, 4, 5]).blocks, table[..2], "not the block that is not full");
        assert_eq!(pool.find(SALT, &[1, 2, 3]).blocks, table[..1]);
        assert_eq!(pool.find(SALT, &[1, 2, 9, 4]).blocks, table[..1]);
        assert!(pool.find(SALT, &[3, 4]).blocks.is_empty(), "another position");
        release(&mut pool, &table);
        pool.check(&[]);
        let prefix = pool.find(SALT, &[1, 2, 3, 4]);
        assert_eq!((&prefix.blocks[..], prefix.idle), (&table[..2], 2));
    }

    #[test]
    fn weights_routing_and_request_divide_prefixes() {
        let mut pool = pool(32);
        let routings = [
            RoutingChoice::Native,
            RoutingChoice::TopK { k: 1, weight_form: None },
            RoutingChoice::TopK { k: 2, weight_form: None },
            RoutingChoice::TopK { k: 2, weight_form: Some(WeightForm::Raw) },
            RoutingChoice::TopK { k: 2, weight_form: Some(WeightForm::Renorm) },
            RoutingChoice::TopK { k: 2, weight_form: Some(WeightForm::Unit) },
            RoutingChoice::Soft { temperature: None },
            RoutingChoice::Soft { temperature: Some(1.0) },
            RoutingChoice::Soft { temperature: Some(0.5) },
            RoutingChoice::Mass { threshold: 0.5, max_k: None, weight_form: None },
            RoutingChoice::Mass { threshold: 0.6, max_k: None, weight_form: None },
        ];
        let mut keys = RoutingKeys::default();
        let each = |ks: [usize; 2]| LayerChoices::Each(ks.map(|k| RoutingChoice::TopK { k, weight_form: None }).into());
        let routings = routings.into_iter().map(LayerChoices::from).chain([each([1, 2]), each([2, 1])]);
        let mut salts: Vec<Salt> =
            routings.filter_map(|routing| keys.key(&routing)).map(|routing| Salt::Common { generation: 1, routing }).collect();
        assert_eq!(keys.key(&each([1, 2])), keys.key(&each([1, 2])));
        salts.push(Salt::Common { generation: 2, routing: RoutingKey::Same(ChoiceKey::Native) });
        salts.extend([(1, 1), (2, 1), (1, 2)].map(|(request, generation)| Salt::Private { request, generation }));
        let tables: Vec<Vec<BlockId>> = salts
            .iter()
            .map(|&salt| {
                assert!(pool.find(salt, &[1, 2]).blocks.is_empty(), "{salt:?}");
                compute(&mut pool, salt, &[1, 2])
            })
            .collect();
        for (&salt, table) in salts.iter().zip(&tables) {
            assert_eq!(&pool.find(salt, &[1, 2]).blocks, table);
        }
    }

    #[test]
    fn a_flood_of_lists_takes_the_prefixes_of_nobody_who_is_there() {
        let mut keys = RoutingKeys::default();
        let list = |bits: usize| {
            let k = |layer: usize| RoutingChoice::TopK { k: 1 + ((bits >> layer) & 1), weight_form: None };
            LayerChoices::Each((0..12).map(k).collect())
        };
        let (served, seldom) = (keys.key(&list(0)), keys.key(&list(1)));
        let mut seen = HashSet::from([served, seldom]);
        for bits in 2..3 * MAX_LISTS {
            let key = keys.key(&list(bits));
            assert!(key.is_some() && seen.insert(key), "every list has a key of its own");
            assert_eq!(keys.key(&list(0)), served, "what is asked for again and again stays");
        }
        assert!(seen.insert(keys.key(&list(1))), "what was forgotten is another now");
        assert_eq!(keys.lists.len(), MAX_LISTS);
    }

    #[test]
    fn the_longest_idle_goes_first_and_held_blocks_stay() {
        let mut pool = pool(4);
        let (a, b) = (compute(&mut pool, SALT, &[1, 2, 3, 4]), compute(&mut pool, SALT, &[5, 6, 7, 8]));
        release(&mut pool, &a);
        pool.hold(a[0]);
        assert_eq!((pool.available(), pool.held()), (1, 3));
        assert_eq!(pool.allocate(), Some(a[1]));
        assert_eq!(pool.find(SALT, &[1, 2, 3, 4]).blocks, a[..1]);
        assert_eq!(pool.allocate(), None, "all are held");
        release(&mut pool, &b);
        pool.release(a[0]);
        assert_eq!([pool.allocate(), pool.allocate()], [Some(b[1]), Some(b[0])], "the end of a chain before its beginning");
        assert_eq!(pool.find(SALT, &[1, 2]).blocks, a[..1]);
        pool.check(&[&[a[1], b[1], b[0]]]);
    }

    #[test]
    fn the_children_of_a_forgotten_block_are_lost() {
        let mut pool = pool(4);
        let table = compute(&mut pool, SALT, &[1, 2, 3, 4]);
        // Released from its beginning, so that the beginning is forgotten first.
        table.iter().for_each(|&id| pool.release(id));
        let fresh = [pool.allocate().unwrap(), pool.allocate().unwrap(), pool.allocate().unwrap()];
        assert!(fresh.contains(&table[0]) && pool.find(SALT, &[1, 2, 3, 4]).blocks.is_empty());
        // The same beginning is another content, even in the same block.
        pool.publish(table[0], Parent::Root(SALT), &[1, 2]);
        assert_eq!(pool.find(SALT, &[1, 2, 3, 4]).blocks, table[..1]);
        pool.check(&[&fresh]);
    }

    #[test]
    fn the_same_content_is_published_once() {
        let mut pool = pool(8);
        let (a, b) = (compute(&mut pool, SALT, &[1, 2, 3, 4]), compute(&mut pool, SALT, &[1, 2, 5, 6]));
        assert_eq!(pool.find(SALT, &[1, 2, 5, 6]).blocks, [a[0], b[1]], "the chain continues from the first");
        release(&mut pool, &b);
        pool.check(&[&a]);
        assert_eq!(pool.free, [b[0]]);
    }

    #[test]
    fn a_collision_is_a_miss() {
        let shape = CacheShape { block_tokens: 2, num_blocks: 8 };
        let mut pool = BlockPool::with_hasher(shape, Box::new(|_, _| 7));
        let a = compute(&mut pool, SALT, &[1, 2, 3, 4]);
        let b = compute(&mut pool, SALT, &[5, 6]);
        assert_eq!(pool.find(SALT, &[1, 2, 3, 4]).blocks, a[..1]);
        assert!(pool.find(SALT, &[5, 6]).blocks.is_empty());
        assert!(pool.find(Salt::Private { request: 0, generation: 1 }, &[1, 2]).blocks.is_empty());
        release(&mut pool, &a);
        release(&mut pool, &b);
        pool.check(&[]);
    }

    #[test]
    fn everything_can_be_forgotten() {
        let mut pool = pool(8);
        let (a, b) = (compute(&mut pool, SALT, &[1, 2, 3, 4]), compute(&mut pool, SALT, &[5, 6]));
        release(&mut pool, &a);
        pool.forget_all();
        assert!(pool.find(SALT, &[1, 2]).blocks.is_empty() && pool.find(SALT, &[5, 6]).blocks.is_empty());
        pool.check(&[&b]);
        release(&mut pool, &b);
        pool.check(&[]);
        assert_eq!(pool.available(), 8);
    }

    #[test]
    fn blocks_cost_nothing_until_they_are_used() {
        let mut pool = pool(u32::MAX as usize);
        let id = pool.allocate().unwrap();
        pool.release(id);
        assert_eq!(pool.blocks.len(), 1);
    }

    /// Random sequences come, share, grow and go. What a found block holds is what the finder would have computed.
    #[test]
    fn random_use() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut pool = pool(rng.random_range(1..20));
            // Tokens, salt and table; by block, the whole history that it was computed from.
            let mut live: Vec<(Vec<u32>, Salt, Vec<BlockId>)> = Vec::new();
            let mut truth: HashMap<BlockId, (Salt, Vec<u32>)> = HashMap::new();
            for _ in 0..300 {
                if rng.random_bool(0.6) {
                    let salt = if rng.random() { SALT } else { Salt::Private { request: rng.random_range(0..2), generation: 1 } };
                    let tokens: Vec<u32> = (0..rng.random_range(1..14)).map(|_| rng.random_range(0..2)).collect();
                    let prefix = pool.find(salt, &tokens[..tokens.len() - 1]);
                    for (index, id) in prefix.blocks.iter().enumerate() {
                        assert_eq!(truth[id], (salt, tokens[..2 * (index + 1)].to_vec()));
                        pool.hold(*id);
                    }
                    let (mut table, mut parent) = (prefix.blocks, Some(prefix.end));
                    for end in (2 * table.len() + 2..tokens.len() + 2).step_by(2) {
                        let Some(id) = pool.allocate() else { break };
                        table.push(id);
                        truth.remove(&id);
                        if let Some(part) = tokens.get(end - 2..end) {
                            truth.insert(id, (salt, tokens[..end].to_vec()));
                            parent = parent.and_then(|parent| pool.publish(id, parent, part));
                        }
                    }
                    live.push((tokens, salt, table));
                } else if !live.is_empty() {
                    let (_, _, table) = live.swap_remove(rng.random_range(0..live.len()));
                    release(&mut pool, &table);
                }
                pool.check(&live.iter().map(|(_, _, table)| &table[..]).collect::<Vec<_>>());
            }
            live.drain(..).for_each(|(_, _, table)| release(&mut pool, &table));
            pool.check(&[]);
            assert_eq!(pool.available(), pool.shape().num_blocks);
        }
    }
}
