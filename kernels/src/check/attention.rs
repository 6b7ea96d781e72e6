//! Attention over caches whose blocks are shuffled, shared and filled up with NaN.

use super::{Bench, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result, Stream, View,
    attention::{Attend, Cache, Heads, Prepare, QkNorm, splits, workspace_len},
    bf16,
    device::memory,
    reference::{self, Paged},
};

/// What lies where nothing must be written.
const UNTOUCHED: f32 = -7.0;

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    for case in cases(bench.quick) {
        case.compare(bench)?;
    }
    nan_stays_with_its_sequence(bench)?;
    others_do_not_matter(bench)?;
    chunks_do_not_matter(bench)?;
    captured_launches_follow_the_device(bench)?;
    parts_of_a_batch(bench)?;
    if !bench.quick {
        places_beyond_32_bits(bench)?;
    }
    Ok(())
}

/// Sequences of `(past, new)` tokens, and how to attend.
#[derive(Clone, Debug)]
struct Case {
    heads: Heads,
    block_tokens: usize,
    window: Option<usize>,
    splits: usize,
    spans: Vec<(usize, usize)>,
    /// Deviation of queries and keys.
    size: f32,
}

fn case(heads: usize, kv_heads: usize, head_dim: usize, spans: &[(usize, usize)]) -> Case {
    let heads = Heads { heads, kv_heads, head_dim };
    Case { heads, block_tokens: 16, window: None, splits: 1, spans: spans.to_vec(), size: 1.0 }
}

fn cases(quick: bool) -> Vec<Case> {
    let decode = [(0, 1), (37, 1), (200, 1), (63, 1), (64, 1)];
    let chunks = [(0, 70), (50, 40), (129, 1), (7, 0), (64, 64)];
    let mut cases = vec![case(1, 1, 8, &[(0, 1)]), case(4, 2, 32, &[(0, 1), (1, 1)])];
    for (head_dim, block_tokens) in [(8, 1), (32, 4), (40, 16), (64, 64), (96, 16), (128, 16), (136, 5), (192, 48), (256, 16)] {
        cases.push(Case { block_tokens, ..case(4, 2, head_dim, &decode) });
        cases.push(Case { block_tokens, ..case(4, 2, head_dim, &chunks) });
        cases.push(Case { block_tokens, splits: 3, ..case(2, 2, head_dim, &decode) });
    }
    for (heads, kv_heads) in [(3, 3), (8, 2), (8, 1), (16, 1), (17, 1), (24, 8)] {
        cases.push(case(heads, kv_heads, 32, &decode));
        cases.push(case(heads, kv_heads, 32, &[(0, 33), (40, 9)]));
        // Several tokens in a tile for few rows, where they fit.
        cases.push(Case { splits: 2, ..case(heads, kv_heads, 64, &[(300, 2), (0, 1), (500, 2)]) });
    }
    for splits in 1..=8 {
        cases.push(Case { splits, ..case(4, 1, 32, &[(0, 1), (127, 1), (128, 1), (700, 1), (1023, 1)]) });
        cases.push(Case { splits, ..case(4, 2, 64, &[(400, 20), (0, 90), (900, 1)]) });
    }
    for window in [1, 3, 16, 50, 64, 65, 200, 100_000] {
        let window = Some(window);
        cases.push(Case { window, ..case(4, 2, 32, &decode) });
        cases.push(Case { window, block_tokens: 64, ..case(4, 2, 64, &chunks) });
        cases.push(Case { window, splits: 2, ..case(4, 2, 32, &[(0, 100), (500, 1), (300, 130)]) });
    }
    for splits in [1, 3] {
        cases.push(Case { size: 100.0, splits, ..case(8, 2, 64, &[(300, 1), (20, 1), (600, 1)]) });
        cases.push(Case { size: 100.0, splits, ..case(8, 2, 64, &[(0, 100), (200, 30)]) });
    }
    cases.push(Case { splits: 32, block_tokens: 256, ..case(16, 1, 32, &[(131_071, 1), (5, 1)]) });
    if !quick {
        let many: Vec<(usize, usize)> = (0..64).map(|i| (i * 37 % 1024, 1)).collect();
        cases.push(Case { splits: 2, ..case(32, 4, 128, &many) });
        cases.push(case(16, 16, 128, &many));
        cases.push(case(8, 1, 128, &[(0, 1500), (3000, 200), (17, 1)]));
        cases.push(Case { splits: 128, ..case(32, 4, 128, &[(131_071, 1)]) });
        cases.push(Case { window: Some(1024), ..case(8, 2, 256, &[(3000, 300), (0, 1)]) });
    }
    cases
}

/// A case with its numbers, as bf16 has them.
struct Numbers {
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    tables: Vec<Vec<u32>>,
    blocks: usize,
}

/// A case on the device.
struct Loaded {
    q: Buffer<bf16>,
    keys: Buffer<bf16>,
    values: Buffer<bf16>,
    table: Buffer<u32>,
    query_start: Buffer<u32>,
    past: Buffer<u32>,
    out: Buffer<bf16>,
    workspace: Buffer<f32>,
    table_stride: usize,
}

/// Rows of `q` before the first sequence and behind the last, which belong to none.
const PADDING: usize = 2;

impl Case {
    fn tokens(&self) -> usize {
        self.spans.iter().map(|span| span.1).sum::<usize>() + 2 * PADDING
    }

    fn longest_new(&self) -> usize {
        self.spans.iter().map(|span| span.1).max().unwrap_or(0)
    }

    /// Blocks in any order; the second half of the sequences begin with what the first sequence has cached in whole blocks, as far as both have.
    fn numbers(&self) -> Numbers {
        let mut random = Random::new(11);
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let needed: Vec<usize> = self.spans.iter().map(|(past, new)| (past + new).div_ceil(self.block_tokens)).collect();
        let blocks = needed.iter().sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        (1..blocks).rev().for_each(|i| free.swap(i, random.below(i + 1)));
        let mut tables: Vec<Vec<u32>> = needed.iter().map(|&needed| free.split_off(free.len() - needed)).collect();
        for s in (self.spans.len() / 2).max(1)..self.spans.len() {
            let shared = self.spans[0].0.min(self.spans[s].0) / self.block_tokens;
            let first = tables[0][..shared].to_vec();
            tables[s][..shared].copy_from_slice(&first);
        }
        let row = kv_heads * self.block_tokens * head_dim;
        let (mut keys, mut values) = (vec![f32::NAN; blocks * row], vec![f32::NAN; blocks * row]);
        for (table, &(past, new)) in tables.iter().zip(&self.spans) {
            for position in 0..past + new {
                for head in 0..kv_heads {
                    let paged = self.paged(&[], &[], table);
                    let at = paged.place(position, head);
                    keys[at..at + head_dim].copy_from_slice(&random.bf16s(head_dim, self.size));
                    values[at..at + head_dim].copy_from_slice(&random.bf16s(head_dim, 1.0));
                }
            }
        }
        Numbers { q: random.bf16s(self.tokens() * heads * head_dim, self.size), keys, values, tables, blocks }
    }

    fn paged<'a>(&self, keys: &'a [f32], values: &'a [f32], table: &'a [u32]) -> Paged<'a> {
        let Heads { kv_heads, head_dim, .. } = self.heads;
        Paged { keys, values, table, block_tokens: self.block_tokens, kv_heads, head_dim }
    }

    fn expected(&self, numbers: &Numbers) -> Vec<f32> {
        let width = self.heads.width();
        let mut out = vec![UNTOUCHED; self.tokens() * width];
        let mut at = PADDING * width;
        for (table, &(past, new)) in numbers.tables.iter().zip(&self.spans) {
            let cache = self.paged(&numbers.keys, &numbers.values, table);
            let end = at + new * width;
            let of = reference::attend(&numbers.q[at..end], past, cache, self.heads.heads, self.window);
            out[at..end].copy_from_slice(&of);
            at = end;
        }
        out
    }

    /// With a sequence behind the last that has no queries, as there are in launches for more than there is.
    fn load(&self, numbers: &Numbers, stream: Stream) -> Result<Loaded> {
        // What lies behind a table is no block.
        let table_stride = numbers.tables.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let entry = |table: &Vec<u32>, i: usize| table.get(i).copied().unwrap_or(u32::MAX);
        let empty = Vec::new();
        let tables = numbers.tables.iter().chain([&empty]);
        let table: Vec<u32> = tables.flat_map(|table| (0..table_stride).map(move |i| entry(table, i))).collect();
        let mut query_start = vec![PADDING as u32];
        for (_, new) in self.spans.iter().chain([&(0, 0)]) {
            query_start.push(query_start[query_start.len() - 1] + *new as u32);
        }
        let past: Vec<u32> = self.spans.iter().map(|span| span.0 as u32).chain([0]).collect();
        let out = vec![UNTOUCHED; self.tokens() * self.heads.width()];
        let workspace = vec![f32::NAN; workspace_len(self.heads, self.tokens(), self.splits)];
        Ok(Loaded {
            q: Buffer::from_slice(stream, &narrow(&numbers.q), "q")?,
            keys: Buffer::from_slice(stream, &narrow(&numbers.keys), "keys")?,
            values: Buffer::from_slice(stream, &narrow(&numbers.values), "values")?,
            table: Buffer::from_slice(stream, &table, "table")?,
            query_start: Buffer::from_slice(stream, &query_start, "query_start")?,
            past: Buffer::from_slice(stream, &past, "past")?,
            out: Buffer::from_slice(stream, &narrow(&out), "out")?,
            workspace: Buffer::from_slice(stream, &workspace, "workspace")?,
            table_stride,
        })
    }

    fn attend<'a>(&self, loaded: &'a Loaded, blocks: usize) -> Attend<'a> {
        Attend {
            q: loaded.q.view(),
            query_start: loaded.query_start.view(),
            past: loaded.past.view(),
            out: loaded.out.view(),
            workspace: loaded.workspace.view(),
            cache: Cache {
                keys: loaded.keys.view(),
                values: loaded.values.view(),
                blocks,
                block_tokens: self.block_tokens,
                table: loaded.table.view(),
                table_stride: loaded.table_stride,
            },
            heads: self.heads,
            window: self.window,
            tokens: self.tokens(),
            sequences: self.spans.len() + 1,
            longest_new: self.longest_new(),
            splits: self.splits,
        }
    }

    fn run(&self, numbers: &Numbers, stream: Stream) -> Result<Vec<f32>> {
        let loaded = self.load(numbers, stream)?;
        self.attend(&loaded, numbers.blocks).launch(stream)?;
        Ok(widen(&loaded.out.to_vec()?))
    }

    fn shape(&self) -> String {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let spans = &self.spans[..self.spans.len().min(5)];
        let Self { block_tokens, window, splits, size, .. } = self;
        format!("{heads}/{kv_heads} x {head_dim}, blocks of {block_tokens}, window {window:?}, {splits} splits, size {size}, {spans:?}")
    }

    fn compare(&self, bench: &mut Bench) -> Result<()> {
        let numbers = self.numbers();
        let found = self.run(&numbers, bench.stream)?;
        bench.compare("attend", self.shape(), &found, &self.expected(&numbers), Tolerance::BF16);
        Ok(())
    }
}

fn nan_stays_with_its_sequence(bench: &mut Bench) -> Result<()> {
    for spans in [&[(40, 1), (70, 1), (300, 1), (33, 1)][..], &[(40, 30), (70, 1), (300, 60), (33, 2)]] {
        for splits in [1, 2] {
            // A block for each token of the cache, none of them shared.
            let case = Case { splits, block_tokens: 128, ..case(4, 2, 64, spans) };
            let mut numbers = case.numbers();
            let width = case.heads.width();
            numbers.q[PADDING * width..][..width].fill(f32::NAN);
            let (key, value) = {
                let of = |s: usize| case.paged(&[], &[], &numbers.tables[s]);
                (of(1).place(3, 0), of(2).place(5, 1))
            };
            numbers.keys[key] = f32::NAN;
            numbers.values[value] = f32::INFINITY;
            let found = case.run(&numbers, bench.stream)?;
            bench.compare("attend: NaN", case.shape(), &found, &case.expected(&numbers), Tolerance::BF16);
        }
    }
    Ok(())
}

/// Bit for bit what each sequence gets alone.
fn others_do_not_matter(bench: &mut Bench) -> Result<()> {
    for (spans, splits) in [(&[(200, 1), (0, 1), (900, 1), (31, 1)][..], 3), (&[(0, 150), (10, 40), (300, 17)], 1)] {
        let batch = Case { splits, block_tokens: 4, ..case(8, 2, 64, spans) };
        let numbers = batch.numbers();
        let all = batch.run(&numbers, bench.stream)?;
        let width = batch.heads.width();
        let mut at = PADDING;
        for (s, &span) in spans.iter().enumerate() {
            let rows = (at - PADDING) * width..(at + span.1 + PADDING) * width;
            let alone = Case { spans: vec![span], ..batch.clone() };
            let numbers = Numbers {
                q: numbers.q[rows].to_vec(),
                keys: numbers.keys.clone(),
                values: numbers.values.clone(),
                tables: vec![numbers.tables[s].clone()],
                blocks: numbers.blocks,
            };
            let found = alone.run(&numbers, bench.stream)?;
            let (mine, same) = (PADDING * width..(PADDING + span.1) * width, at * width..(at + span.1) * width);
            bench.same("attend: alone", alone.shape(), &found[mine].to_vec(), &all[same].to_vec());
            at += span.1;
        }
    }
    Ok(())
}

/// A prompt in two chunks gets, bit for bit, what it gets in one.
fn chunks_do_not_matter(bench: &mut Bench) -> Result<()> {
    for (cut, window) in [(100, None), (77, Some(50))] {
        let whole = Case { window, ..case(8, 2, 64, &[(0, 200)]) };
        let numbers = whole.numbers();
        let expected = whole.run(&numbers, bench.stream)?;
        let width = whole.heads.width();
        let mut found = vec![UNTOUCHED; PADDING * width];
        for (from, to) in [(0, cut), (cut, 200)] {
            let chunk = Case { spans: vec![(from, to - from)], ..whole.clone() };
            let loaded = chunk.load(&numbers, bench.stream)?;
            let q = loaded.q.view().part(from * width..);
            Attend { q, ..chunk.attend(&loaded, numbers.blocks) }.launch(bench.stream)?;
            found.extend(&widen(&loaded.out.to_vec()?)[PADDING * width..(PADDING + to - from) * width]);
        }
        found.extend(vec![UNTOUCHED; PADDING * width]);
        bench.same("attend: chunks", format!("cut at {cut}, window {window:?}"), &found, &expected);
    }
    Ok(())
}

/// Single tokens and a prompt of one batch in two launches.
fn parts_of_a_batch(bench: &mut Bench) -> Result<()> {
    // With more rows before the prompts than a tile has, too.
    for (singles, prompts) in [(2, 1), (70, 2)] {
        let mut spans = vec![(900, 1), (0, 1)];
        spans.extend((2..singles).map(|past| (past, 1)));
        spans.extend([(30, 90), (0, 50)].iter().take(prompts));
        let both = Case { splits: 3, ..case(8, 2, 32, &spans) };
        let numbers = both.numbers();
        let loaded = both.load(&numbers, bench.stream)?;
        let all = both.attend(&loaded, numbers.blocks);
        let cache = Cache { table: all.cache.table.part(singles * loaded.table_stride..), ..all.cache };
        let (query_start, past) = (all.query_start.part(singles..), all.past.part(singles..));
        Attend { query_start, past, cache, sequences: prompts, splits: 1, ..all }.launch(bench.stream)?;
        // Which leaves the others alone.
        let others = &widen(&loaded.out.to_vec()?)[..(PADDING + singles) * both.heads.width()];
        bench.same("attend: parts", format!("{}: before the part", both.shape()), &others.iter().all(|&x| x == UNTOUCHED), &true);
        Attend { sequences: singles, longest_new: 1, ..all }.launch(bench.stream)?;
        bench.compare("attend: parts", both.shape(), &widen(&loaded.out.to_vec()?), &both.expected(&numbers), Tolerance::BF16);
    }
    Ok(())
}

/// A launch that was captured for short sequences serves longer ones.
fn captured_launches_follow_the_device(bench: &mut Bench) -> Result<()> {
    let stream = bench.stream;
    let long = Case { splits: 4, ..case(8, 2, 32, &[(900, 1), (0, 1), (500, 1)]) };
    let numbers = long.numbers();
    let loaded = long.load(&numbers, stream)?;
    let short: Vec<u32> = vec![3, 0, 1, 0];
    let past = loaded.past.to_vec()?;
    loaded.past.view().write(&short, stream)?;
    let graph = stream.capture(|| long.attend(&loaded, numbers.blocks).launch(stream))?;
    for lengths in [&short, &past] {
        loaded.past.view().write(lengths, stream)?;
        graph.launch(stream)?;
        let spans = lengths.iter().take(3).map(|&past| (past as usize, 1)).collect();
        let expected = Case { spans, ..long.clone() }.expected(&numbers);
        bench.compare("attend: captured", format!("behind {lengths:?}"), &widen(&loaded.out.to_vec()?), &expected, Tolerance::BF16);
    }
    Ok(())
}

/// A cache of more than 2^31 elements, of which the last blocks are used; where there is room for it.
fn places_beyond_32_bits(bench: &mut Bench) -> Result<()> {
    let (stream, mut random) = (bench.stream, Random::new(17));
    let heads = Heads { heads: 4, kv_heads: 4, head_dim: 256 };
    let (block_tokens, tokens) = (16, 40);
    let row = heads.kv_heads * block_tokens * heads.head_dim;
    let blocks = (1usize << 31) / row + 100;
    let (free, _) = memory()?;
    if free < 3 * (blocks * row * size_of::<bf16>()) as u64 {
        return Ok(());
    }
    let (keys, values) = (Buffer::<bf16>::new(stream, blocks * row, "keys")?, Buffer::<bf16>::new(stream, blocks * row, "values")?);
    let ids: Vec<u32> = (0..3).map(|i| (blocks - 1 - 7 * i) as u32).collect();
    let qkv = random.bf16s(tokens * heads.qkv_width(), 1.0);
    let position: Vec<u32> = (0..tokens as u32).collect();
    let device = Buffer::from_slice(stream, &narrow(&qkv), "qkv")?;
    let frequencies = Buffer::from_slice(stream, &[0f32; 128], "frequencies")?;
    let (table, indices) = (Buffer::from_slice(stream, &ids, "table")?, Buffer::from_slice(stream, &position, "position")?);
    let sequence = Buffer::<u32>::zeros(stream, tokens, "sequence")?;
    let query_start = Buffer::from_slice(stream, &[0, tokens as u32], "query_start")?;
    let (q, out) = (Buffer::new(stream, tokens * heads.width(), "q")?, Buffer::new(stream, tokens * heads.width(), "out")?);
    let cache = Cache { keys: keys.view(), values: values.view(), blocks, block_tokens, table: table.view(), table_stride: 3 };
    Prepare {
        qkv: device.view(),
        bias: None,
        norm: QkNorm::None,
        epsilon: 1e-5,
        clip: None,
        inverse_frequencies: frequencies.view(),
        rope_scale: 1.0,
        sequence: sequence.view(),
        position: indices.view(),
        q: q.view(),
        cache,
        heads,
        tokens,
    }
    .launch(stream)?;
    let workspace: View<'_, f32> = frequencies.view();
    let splits = splits(heads, 1, tokens, tokens, 132);
    Attend {
        q: q.view(),
        query_start: query_start.view(),
        past: sequence.view(),
        out: out.view(),
        workspace,
        cache,
        heads,
        window: None,
        tokens,
        sequences: 1,
        longest_new: tokens,
        splits,
    }
    .launch(stream)?;

    // Frequencies of 0 rotate nothing; one block of everything has the order of the product.
    let part = |i: usize| -> Vec<f32> {
        let rows = qkv.chunks_exact(heads.qkv_width()).map(|row| &row[i * heads.width()..(i + 1) * heads.width()]);
        rows.flatten().copied().collect()
    };
    let by_head = |x: Vec<f32>| -> Vec<f32> {
        let rows = (0..heads.kv_heads).flat_map(|head| (0..tokens).map(move |token| (token * heads.kv_heads + head) * heads.head_dim));
        rows.flat_map(|at| x[at..at + heads.head_dim].to_vec()).collect()
    };
    let (keys, values) = (by_head(part(1)), by_head(part(2)));
    let plain =
        Paged { keys: &keys, values: &values, table: &[0], block_tokens: tokens, kv_heads: heads.kv_heads, head_dim: heads.head_dim };
    let expected = reference::attend(&part(0), 0, plain, heads.heads, None);
    bench.compare("attend: large cache", format!("{blocks} blocks"), &widen(&out.to_vec()?), &expected, Tolerance::BF16);
    Ok(())
}
