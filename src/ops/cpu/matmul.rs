//! Rows times weight matrices, `y[m, n] = Σ_k x[m, k] · w[n, k]`, for one row or thousands, and the experts made of such products.
//!
//! Three forms, chosen by the number of rows that share a matrix:
//! * few rows ([`dot`]): weights stream by once; bound by memory;
//! * many rows, f32 ([`panel`]): register tiles over packed tokens; bf16 and 8-bit weights are widened a few rows at a time;
//! * many rows, bf16 or 8-bit weights where the CPU multiplies bf16 ([`amx`], AVX512-BF16): activations are rounded to bf16, sums
//!   are f32.
//!
//! All products of a call share one list of tasks, so that experts with one row and experts with a thousand keep all threads busy.

use std::{
    cell::RefCell,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::{amx, dot_q8};
use super::{
    dot::{self, Emit, FEW_ROWS},
    matrix::{Data, Matrix, Q8Rows, Row, Rows},
    pack::{self, BLOCK, Format, Line},
    panel::{self, MAX_BLOCKS, MAX_ROWS, TileShape},
    simd::{Bf16Unit, Isa, Portable, Simd},
    sink::{Disjoint, PackedSink, RowSink, Sink, Store},
};

/// Weight rows that are prepared at once: with all k elements they stay in the second-level cache while tokens stream by.
const STRIP: usize = 64;

/// Multiplications in a task, at least: smaller ones cost more to hand out than to compute.
const TASK_PRODUCTS: usize = 1 << 16;

/// Tasks per thread, so that threads end at about the same time.
const TASKS_PER_THREAD: usize = 6;

/// As below, of 8-bit weights, which cost more to narrow than to multiply as integers.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
const FEW_Q8_BEFORE_TILES: usize = 3;

/// Rows up to which [`dot`] is not slower than AMX tiles that are mostly empty.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
const FEW_BEFORE_TILES: usize = 4;

/// The order in which products are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Whatever is fastest for the number of rows: a row alone and the same row among many may differ in the last bits.
    #[default]
    Fastest,
    /// One form for any number of rows: a row gets the same bits in any batch.
    BatchInvariant,
}

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// Vector instructions.
    pub isa: Isa,
    /// Instructions for bf16.
    pub bf16: Bf16Unit,
    /// Order of sums.
    pub reduction: Reduction,
}

impl Arithmetic {
    /// The best that this CPU has.
    pub fn detect(reduction: Reduction) -> Self {
        Self { isa: Isa::detect(), bf16: Bf16Unit::detect(), reduction }
    }

    /// The vector instructions of this CPU, in f32 whatever the weights: nothing is rounded, and nothing depends on the batch.
    pub fn exact() -> Self {
        Self { isa: Isa::detect(), bf16: Bf16Unit::None, reduction: Reduction::BatchInvariant }
    }

    /// Plain Rust, whatever the CPU has.
    pub fn portable(reduction: Reduction) -> Self {
        Self { isa: Isa::Portable, bf16: Bf16Unit::None, reduction }
    }
}

/// Rows of activations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    /// `[*, k]`.
    pub(crate) x: &'a [f32],
    /// Inner dimension.
    pub(crate) k: usize,
    /// Row of `x` for each row of the output; `None`: the same row.
    pub(crate) source: Option<&'a [u32]>,
}

/// One weight matrix and the rows that it multiplies.
#[derive(Clone, Debug)]
pub(crate) struct Product<'a> {
    pub(crate) weights: Matrix<'a>,
    /// Rows of the output (and of the input, through its `source`).
    pub(crate) rows: Range<usize>,
    /// First column of the output; there are as many as weight rows.
    pub(crate) column: usize,
}

/// Row-major.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    pub(crate) values: &'a mut [f32],
    /// Columns.
    pub(crate) stride: usize,
    pub(crate) store: Store,
}

/// An expert and what is routed to it.
#[derive(Clone, Debug)]
pub(crate) struct Expert<'a> {
    /// `[2F, D]`: F rows of gate, then F rows of up.
    pub(crate) gate_up: Matrix<'a>,
    /// `[D, F]`.
    pub(crate) down: Matrix<'a>,
    /// Rows of the output, in order and without a gap between experts.
    pub(crate) rows: Range<usize>,
}

/// Buffers that calls share; they grow to the largest call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    packed: Vec<Line>,
    packed_hidden: Vec<Line>,
    hidden: Vec<f32>,
    plans: Vec<Plan>,
    packs: Vec<Pack>,
    tasks: Vec<Task>,
    /// The most that calls needed since [`Scratch::trim`]: elements of `packed`, `packed_hidden` and `hidden`.
    used: [usize; 3],
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Few,
    Panel,
    #[cfg(target_arch = "x86_64")]
    Pairs,
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

/// A product, prepared.
#[derive(Clone, Copy, Debug)]
struct Plan {
    form: Form,
    /// Its first packed line.
    input: usize,
    /// Where its hidden values start, in rows or lines.
    hidden: usize,
}

/// Rows to pack.
#[derive(Clone, Debug)]
struct Pack {
    rows: Range<usize>,
    format: Format,
    start: usize,
}

/// Columns of one product.
#[derive(Clone, Debug)]
struct Task {
    product: usize,
    columns: Range<usize>,
}

/// Where a product finds its input.
#[derive(Clone, Copy)]
enum Source<'a> {
    Rows { input: Input<'a>, first: usize },
    Packed(&'a [Line]),
}

impl Form {
    fn format(self) -> Option<Format> {
        match self {
            Self::Few => None,
            Self::Panel => Some(Format::F32),
            #[cfg(target_arch = "x86_64")]
            Self::Pairs | Self::Tiles => Some(Format::Bf16),
        }
    }

    /// Columns of a task are a multiple of this. `gated`: each column takes two weight rows.
    fn unit(self, gated: bool) -> usize {
        let rows = match self {
            Self::Few => 4,
            Self::Panel => MAX_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => MAX_ROWS,
            #[cfg(target_arch = "x86_64")]
            Self::Tiles => 32,
        };
        if gated { rows / 2 } else { rows }
    }
}

/// Runs `task(0..count)` on all threads.
pub(crate) fn parallel(count: usize, task: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(count);
    if threads <= 1 {
        (0..count).for_each(task);
        return;
    }
    let next = AtomicUsize::new(0);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            task(index);
        }
    });
}

impl Scratch {
    fn clear(&mut self) {
        self.plans.clear();
        self.packs.clear();
        self.tasks.clear();
    }

    /// Gives back what the calls since the last time did not need by far.
    pub(crate) fn trim(&mut self) {
        let [packed, packed_hidden, hidden] = std::mem::take(&mut self.used);
        trim(&mut self.packed, packed);
        trim(&mut self.packed_hidden, packed_hidden);
        trim(&mut self.hidden, hidden);
    }

    /// Plans the packing of `rows`, unless they are packed already; the first line.
    fn pack(&mut self, rows: &Range<usize>, format: Format, k: usize) -> usize {
        if let Some(same) = self.packs.iter().find(|pack| pack.rows == *rows && pack.format == format) {
            return same.start;
        }
        let start = self.packs.last().map_or(0, |last| last.start + last.rows.len().div_ceil(BLOCK) * last.format.block_lines(k));
        self.packs.push(Pack { rows: rows.clone(), format, start });
        start
    }

    /// Packs what was planned.
    fn run_packs(&mut self, isa: Isa, input: Input<'_>) {
        let Some(last) = self.packs.last() else { return };
        let lines = last.start + last.rows.len().div_ceil(BLOCK) * last.format.block_lines(input.k);
        self.used[0] = self.used[0].max(lines);
        grow(&mut self.packed, lines, Line::ZERO);
        let out = Disjoint::new(&mut self.packed);
        // Blocks of tokens are numbered through; most calls have one pack.
        let blocks = |pack: &Pack| pack.rows.len().div_ceil(BLOCK);
        let packs = &self.packs;
        parallel(packs.iter().map(blocks).sum(), |index| {
            let mut block = index;
            for pack in packs {
                if block >= blocks(pack) {
                    block -= blocks(pack);
                    continue;
                }
                let first = pack.rows.start + block * BLOCK;
                let mut rows: [&[f32]; BLOCK] = [&[]; BLOCK];
                let count = (pack.rows.end - first).min(BLOCK);
                rows.iter_mut().take(count).zip(first..).for_each(|(to, row)| *to = input.row(row));
                let lines = pack.format.block_lines(input.k);
                // SAFETY: each block has its own lines.
                let out = unsafe { out.slice(pack.start + block * lines..pack.start + (block + 1) * lines) };
                pack::pack(isa, pack.format, &rows[..count], out);
                return;
            }
        });
    }

    /// Cuts products of (rows, columns, multiplications per column, form) into tasks, `gated` as in [`Form::unit`].
    fn cut(&mut self, sizes: impl Iterator<Item = (usize, usize, usize)> + Clone, gated: bool) {
        self.tasks.clear();
        // A sweep over weights costs as much as some rows, however few there are.
        let cost = |rows: usize, k: usize| (rows + 4) * k;
        let total: usize = sizes.clone().map(|(rows, columns, k)| cost(rows, k) * columns).sum();
        let target = (total / (rayon::current_num_threads() * TASKS_PER_THREAD)).max(TASK_PRODUCTS);
        for (product, (rows, columns, k)) in sizes.enumerate() {
            let unit = self.plans[product].form.unit(gated);
            let step = (target / cost(rows, k).max(1)).max(1).next_multiple_of(unit);
            let cuts = (0..if rows == 0 { 0 } else { columns }).step_by(step);
            self.tasks.extend(cuts.map(|start| Task { product, columns: start..columns.min(start + step) }));
        }
    }
}

/// Buffers that are larger than this are given back when a step needs less than a fourth of them: soft routing of one long prompt
/// should not cost memory for ever.
pub(crate) const KEPT_BYTES: usize = 64 << 20;

/// Gives memory back that a step which needed `used` elements did not need.
pub(crate) fn trim<T>(buffer: &mut Vec<T>, used: usize) {
    if buffer.len() * size_of::<T>() > KEPT_BYTES && used < buffer.len() / 4 {
        buffer.truncate(used);
        buffer.shrink_to_fit();
    }
}

impl<'a> Input<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        let row = self.source.map_or(row, |source| source[row] as usize);
        &self.x[row * self.k..(row + 1) * self.k]
    }
}

impl Arithmetic {
    /// What makes it sound to run the instructions.
    fn check(&self) {
        assert!(self.isa.is_available(), "this CPU has no {:?}", self.isa);
    }

    /// The form for `rows` rows of `weights`.
    fn form(&self, rows: usize, weights: &Matrix<'_>) -> Form {
        let few = |limit: usize| rows <= limit && self.reduction == Reduction::Fastest;
        #[cfg(target_arch = "x86_64")]
        if weights.is_narrow() {
            match self.bf16 {
                Bf16Unit::Amx if weights.k().is_multiple_of(amx::DEPTH) && weights.rows().is_multiple_of(16) => {
                    let limit = if matches!(weights.data(), Data::Bf16(_)) { FEW_BEFORE_TILES } else { FEW_Q8_BEFORE_TILES };
                    return if few(limit) { Form::Few } else { Form::Tiles };
                }
                _ if few(FEW_ROWS) => return Form::Few,
                Bf16Unit::Amx | Bf16Unit::Avx512 if weights.k().is_multiple_of(2) => return Form::Pairs,
                _ => {}
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = weights;
        if few(FEW_ROWS) { Form::Few } else { Form::Panel }
    }

    /// The form of both products of an expert.
    fn expert_form(&self, rows: usize, gate_up: &Matrix<'_>, down: &Matrix<'_>) -> Form {
        let (first, second) = (self.form(rows, gate_up), self.form(rows, down));
        // Hidden values leave the first product in blocks that only fit together if F is a multiple of their depth.
        if first == second && (first.format() != Some(Format::Bf16) || down.k().is_multiple_of(32)) { first } else { Form::Panel }
    }

    /// Each row times its weights.
    pub(crate) fn linear(&self, scratch: &mut Scratch, input: Input<'_>, products: &[Product<'_>], output: Output<'_>) {
        check(input, products, &output);
        self.check();
        scratch.clear();
        for product in products {
            assert_eq!(product.weights.k(), input.k, "weights of another width than their input: this is a bug");
            let form = self.form(product.rows.len(), &product.weights);
            let start = form.format().map_or(0, |format| scratch.pack(&product.rows, format, input.k));
            scratch.plans.push(Plan { form, input: start, hidden: 0 });
        }
        scratch.run_packs(self.isa, input);
        scratch.cut(products.iter().map(|product| (product.rows.len(), product.weights.rows(), input.k)), false);
        let out = Disjoint::new(output.values);
        let (packed, plans, tasks) = (&scratch.packed, &scratch.plans, &scratch.tasks);
        parallel(tasks.len(), |task| {
            let Task { product, columns } = tasks[task].clone();
            let (plan, product) = (plans[product], &products[product]);
            let source = match plan.form {
                Form::Few => Source::Rows { input, first: product.rows.start },
                _ => Source::Packed(&packed[plan.input..]),
            };
            let (rows, column) = (product.rows.clone(), product.column);
            let mut sink = RowSink { isa: self.isa, out: &out, stride: output.stride, rows, column, store: output.store };
            self.run(plan.form, &product.weights, product.rows.len(), source, columns, None, &mut sink);
        });
    }

    /// Each row through its expert, `down(silu(gate x) ⊙ up x)`: `[R, D]` into `out`.
    pub(crate) fn experts(&self, scratch: &mut Scratch, input: Input<'_>, experts: &[Expert<'_>], out: &mut [f32]) {
        let Some(f) = experts.first().map(|expert| expert.down.k()) else { return };
        let d = input.k;
        check_experts(input, experts, out, f);
        self.check();
        scratch.clear();
        let (mut hidden_rows, mut hidden_lines) = (0, 0);
        for expert in experts {
            let rows = expert.rows.len();
            let form = self.expert_form(rows, &expert.gate_up, &expert.down);
            let (start, hidden) = match form.format() {
                None => (0, take(&mut hidden_rows, rows)),
                Some(format) => {
                    let lines = rows.div_ceil(BLOCK) * format.block_lines(f);
                    (scratch.pack(&expert.rows, format, d), take(&mut hidden_lines, lines))
                }
            };
            scratch.plans.push(Plan { form, input: start, hidden });
        }
        scratch.run_packs(self.isa, input);
        scratch.used = [scratch.used[0], scratch.used[1].max(hidden_lines), scratch.used[2].max(hidden_rows * f)];
        grow(&mut scratch.hidden, hidden_rows * f, 0.0);
        grow(&mut scratch.packed_hidden, hidden_lines, Line::ZERO);

        scratch.cut(experts.iter().map(|expert| (expert.rows.len(), f, 2 * d)), true);
        {
            let (packed, plans, tasks) = (&scratch.packed, &scratch.plans, &scratch.tasks);
            let (hidden, lines) = (Disjoint::new(&mut scratch.hidden), Disjoint::new(&mut scratch.packed_hidden));
            parallel(tasks.len(), |task| {
                let Task { product, columns } = tasks[task].clone();
                let (plan, expert) = (plans[product], &experts[product]);
                let rows = expert.rows.len();
                match plan.form.format() {
                    None => {
                        let source = Source::Rows { input, first: expert.rows.start };
                        let place = plan.hidden..plan.hidden + rows;
                        let mut sink = RowSink { isa: self.isa, out: &hidden, stride: f, rows: place, column: 0, store: Store::Set };
                        self.run(plan.form, &expert.gate_up, rows, source, columns, Some(f), &mut sink);
                    }
                    Some(format) => {
                        let source = Source::Packed(&packed[plan.input..]);
                        let mut sink = PackedSink { isa: self.isa, format, out: &lines, start: plan.hidden, k: f };
                        self.run(plan.form, &expert.gate_up, rows, source, columns, Some(f), &mut sink);
                    }
                }
            });
        }

        scratch.cut(experts.iter().map(|expert| (expert.rows.len(), d, f)), false);
        let (plans, tasks) = (&scratch.plans, &scratch.tasks);
        let out = Disjoint::new(out);
        parallel(tasks.len(), |task| {
            let Task { product, columns } = tasks[task].clone();
            let (plan, expert) = (plans[product], &experts[product]);
            let source = match plan.form {
                Form::Few => Source::Rows { input: Input { x: &scratch.hidden, k: f, source: None }, first: plan.hidden },
                _ => Source::Packed(&scratch.packed_hidden[plan.hidden..]),
            };
            let mut sink = RowSink { isa: self.isa, out: &out, stride: d, rows: expert.rows.clone(), column: 0, store: Store::Set };
            self.run(plan.form, &expert.down, expert.rows.len(), source, columns, None, &mut sink);
        });
    }

    /// `columns` of one product. With `pair = F` the weights are F rows of gate and F of up, and columns those of `silu(gate) · up`.
    #[expect(clippy::too_many_arguments, reason = "the parts of a task, taken apart in one place")]
    fn run<K: Sink>(
        &self,
        form: Form,
        weights: &Matrix<'_>,
        rows: usize,
        source: Source<'_>,
        columns: Range<usize>,
        pair: Option<usize>,
        sink: &mut K,
    ) {
        match (form, source) {
            (Form::Few, Source::Rows { input, first }) => {
                let mut x: [&[f32]; FEW_ROWS] = [&[]; FEW_ROWS];
                x.iter_mut().take(rows).zip(first..).for_each(|(to, row)| *to = input.row(row));
                let x = &x[..rows];
                match weights.data() {
                    Data::F32(w) => self.few(x, w, input.k, columns, pair, sink),
                    // Many rows would be rounded to bf16: few are as well, so that the two differ by the order of sums only.
                    #[cfg(target_arch = "x86_64")]
                    Data::Bf16(w) if self.bf16 != Bf16Unit::None => {
                        let mut buffer = STRIP_BUFFER.take();
                        let lines = input.k.div_ceil(BLOCK);
                        grow(&mut buffer, x.len() * lines, Line::ZERO);
                        for (row, out) in x.iter().zip(buffer.chunks_exact_mut(lines.max(1))) {
                            // SAFETY: the CPU has AVX-512, as it has a bf16 unit.
                            unsafe { pack::x86::round_row(row, out) };
                        }
                        let mut rounded: [&[f32]; FEW_ROWS] = [&[]; FEW_ROWS];
                        for (to, lines) in rounded.iter_mut().take(x.len()).zip(buffer.chunks_exact(lines.max(1))) {
                            // SAFETY: a line is 16 f32, without padding; there are enough for k.
                            *to = unsafe { std::slice::from_raw_parts(lines.as_ptr().cast::<f32>(), input.k) };
                        }
                        self.few(&rounded[..x.len()], w, input.k, columns, pair, sink);
                        STRIP_BUFFER.set(buffer);
                    }
                    Data::Bf16(w) => self.few(x, w, input.k, columns, pair, sink),
                    // SAFETY: the CPU has AVX-512, says `isa`.
                    #[cfg(target_arch = "x86_64")]
                    Data::Q8 { values, scales } if self.isa == Isa::Avx512 => unsafe {
                        dot_q8::run(x, Q8Rows { values, scales }, input.k, columns, pair, sink);
                    },
                    Data::Q8 { values, scales } => self.few(x, Q8Rows { values, scales }, input.k, columns, pair, sink),
                }
            }
            (Form::Panel, Source::Packed(lines)) => self.panel(weights, lines, rows, columns, pair, sink),
            #[cfg(target_arch = "x86_64")]
            (Form::Pairs, Source::Packed(lines)) => narrow::pairs(weights, lines, rows, columns, pair, sink),
            #[cfg(target_arch = "x86_64")]
            (Form::Tiles, Source::Packed(lines)) => narrow::tiles(weights, lines, rows, columns, pair, sink),
            _ => unreachable!("a product without its input: this is a bug"),
        }
    }

    fn few<W: Rows>(&self, x: &[&[f32]], w: W, k: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Emit) {
        match self.isa {
            // SAFETY: `check` has seen that the CPU has it; so below.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { few_avx512(x, w, k, columns, pair, sink) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { few_avx2(x, w, k, columns, pair, sink) },
            // SAFETY: Portable needs nothing.
            Isa::Portable => unsafe { dot::run::<Portable, W>(x, w, k, columns, pair, sink) },
        }
    }

    fn panel(&self, weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
        match self.isa {
            // SAFETY: as in `few`.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { panel_avx512(weights, x, rows, columns, pair, sink) },
            // SAFETY: as in `few`.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { panel_avx2(weights, x, rows, columns, pair, sink) },
            // SAFETY: Portable needs nothing.
            Isa::Portable => unsafe { panel_task::<Portable>(weights, x, rows, columns, pair, sink) },
        }
    }
}

/// Output rows and columns of different products must be different places: what makes the writes of tasks sound.
fn check(input: Input<'_>, products: &[Product<'_>], output: &Output<'_>) {
    for (index, product) in products.iter().enumerate() {
        let columns = product.column..product.column + product.weights.rows();
        assert!(
            product.rows.start <= product.rows.end
                && product.rows.end * output.stride <= output.values.len()
                && columns.end <= output.stride,
            "a product outside of its output: this is a bug"
        );
        assert!(input.source.is_none_or(|source| product.rows.end <= source.len()), "a product without input: this is a bug");
        // Neighbours are compared; products come in order of rows or, for the same rows, of columns.
        if let Some(before) = index.checked_sub(1).map(|before| &products[before]) {
            let apart = before.rows.end <= product.rows.start
                || (before.rows == product.rows && before.column + before.weights.rows() <= product.column);
            assert!(apart, "products that overlap: this is a bug");
        }
    }
}

fn check_experts(input: Input<'_>, experts: &[Expert<'_>], out: &[f32], f: usize) {
    let mut end = 0;
    for expert in experts {
        assert!(expert.rows.start == end && expert.rows.end >= end, "experts whose rows overlap or leave a gap: this is a bug");
        end = expert.rows.end;
        let sizes = (expert.gate_up.rows(), expert.gate_up.k(), expert.down.rows(), expert.down.k());
        assert_eq!(sizes, (2 * f, input.k, input.k, f), "an expert of another size: this is a bug");
    }
    assert!(out.len() >= end * input.k && input.source.is_none_or(|source| end <= source.len()), "more rows than places: this is a bug");
}

/// The next `count` of what is counted; the first of them.
fn take(next: &mut usize, count: usize) -> usize {
    let first = *next;
    *next += count;
    first
}

fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, value: T) {
    if buffer.len() < len {
        buffer.resize(len, value);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn few_avx512<W: Rows>(x: &[&[f32]], w: W, k: usize, columns: Range<usize>, pair: Option<usize>, emit: &mut impl Emit) {
    // SAFETY: the target features are enabled here.
    unsafe { dot::run::<super::simd::x86::Avx512, W>(x, w, k, columns, pair, emit) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn few_avx2<W: Rows>(x: &[&[f32]], w: W, k: usize, columns: Range<usize>, pair: Option<usize>, emit: &mut impl Emit) {
    // SAFETY: the target features are enabled here.
    unsafe { dot::run::<super::simd::x86::Avx2, W>(x, w, k, columns, pair, emit) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn panel_avx512(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    // SAFETY: the target features are enabled here.
    unsafe { panel_task::<super::simd::x86::Avx512>(weights, x, rows, columns, pair, sink) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn panel_avx2(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    // SAFETY: the target features are enabled here.
    unsafe { panel_task::<super::simd::x86::Avx2>(weights, x, rows, columns, pair, sink) }
}

thread_local! {
    /// Weight rows, widened or narrowed for one strip of a task.
    static STRIP_BUFFER: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// The weight rows of columns `column ..` of a strip, in the order of the tile: rows of gate, then rows of up, if paired. Columns
/// beyond `end` repeat the last.
#[inline(always)]
fn weight_row(slot: usize, slots: usize, column: usize, end: usize, pair: Option<usize>) -> usize {
    match pair {
        None => (column + slot).min(end - 1),
        Some(width) => (column + slot % (slots / 2)).min(end - 1) + slot / (slots / 2) * width,
    }
}

/// [`Form::Panel`] of one task.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn panel_task<S: Simd>(
    weights: &Matrix<'_>,
    x: &[Line],
    rows: usize,
    columns: Range<usize>,
    pair: Option<usize>,
    sink: &mut impl Sink,
) {
    let shape = TileShape::of::<S>();
    let (k, blocks) = (weights.k(), rows.div_ceil(BLOCK));
    assert!(x.len() >= blocks * k, "less input than rows: this is a bug");
    let per_tile = if pair.is_some() { shape.rows / 2 } else { shape.rows };
    let strip = if pair.is_some() { STRIP / 2 } else { STRIP };
    let mut buffer = STRIP_BUFFER.take();
    for start in columns.clone().step_by(strip) {
        let end = columns.end.min(start + strip);
        let tiles = (end - start).div_ceil(per_tile);
        let widened = match weights.data() {
            Data::F32(_) => None,
            Data::Bf16(w) => Some(widen::<S, _>(&mut buffer, w, k, (start, end), tiles, shape.rows, pair)),
            Data::Q8 { values, scales } => {
                Some(widen::<S, _>(&mut buffer, Q8Rows { values, scales }, k, (start, end), tiles, shape.rows, pair))
            }
        };
        for block in (0..blocks).step_by(shape.blocks) {
            let count = shape.blocks.min(blocks - block);
            let inputs: [*const f32; MAX_BLOCKS] = std::array::from_fn(|b| x[(block + b.min(count - 1)) * k..][..k].as_ptr().cast::<f32>());
            for tile in 0..tiles {
                let column = start + tile * per_tile;
                let w: [*const f32; MAX_ROWS] = std::array::from_fn(|slot| {
                    let slot = slot.min(shape.rows - 1);
                    match (weights.data(), widened) {
                        (Data::F32(w), _) => w.row(weight_row(slot, shape.rows, column, end, pair), k),
                        (_, Some(wide)) => wide[(tile * shape.rows + slot) * k..][..k].as_ptr(),
                        (_, None) => unreachable!("weights were widened above"),
                    }
                });
                let mut out = [[Line::ZERO; MAX_BLOCKS]; MAX_ROWS];
                // SAFETY: the CPU has `S`; the slices above have k elements, or k lines.
                unsafe { panel::products::<S>(w, &inputs[..count], k, &mut out) };
                // SAFETY: the CPU has `S`.
                unsafe {
                    finish::<S>(&out, shape.rows, per_tile.min(end - column), count, pair, |b, values| {
                        sink.block(block + b, column, values);
                    });
                }
            }
        }
    }
    STRIP_BUFFER.set(buffer);
}

/// Hands the products of a tile to `emit`, block by block; gated if paired.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn finish<S: Simd>(
    out: &panel::Products,
    tile_rows: usize,
    made: usize,
    blocks: usize,
    pair: Option<usize>,
    mut emit: impl FnMut(usize, &[Line]),
) {
    #[expect(clippy::needless_range_loop, reason = "the index names a block")]
    for b in 0..blocks {
        let mut values = [Line::ZERO; MAX_ROWS];
        for (r, value) in values.iter_mut().enumerate().take(made) {
            *value = match pair {
                None => out[r][b],
                // SAFETY: the caller's contract.
                Some(_) => unsafe { gated::<S>(&out[r][b], &out[r + tile_rows / 2][b]) },
            };
        }
        emit(b, &values[..made]);
    }
}

/// `silu(gate) · up`.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
unsafe fn gated<S: Simd>(gate: &Line, up: &Line) -> Line {
    // SAFETY: the caller's contract.
    Line(unsafe { S::swiglu(&gate.0, &up.0) })
}

/// The rows of a strip as f32, in the order of tiles.
#[inline(always)]
fn widen<S: Simd, W: Rows>(
    buffer: &mut Vec<Line>,
    weights: W,
    k: usize,
    (start, end): (usize, usize),
    tiles: usize,
    tile_rows: usize,
    pair: Option<usize>,
) -> &[f32] {
    let per_tile = if pair.is_some() { tile_rows / 2 } else { tile_rows };
    let rows = tiles * tile_rows;
    grow(buffer, (rows * k).div_ceil(16), Line::ZERO);
    // SAFETY: lines are 16 f32 each, without padding.
    let out = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<f32>(), rows * k) };
    for (slot, out) in out.chunks_exact_mut(k).enumerate() {
        let row = weights.row(weight_row(slot % tile_rows, tile_rows, start + slot / tile_rows * per_tile, end, pair), k);
        let whole = k / S::LANES * S::LANES;
        // SAFETY: the CPU has `S` (the caller's contract); offsets stay below k.
        unsafe {
            (0..whole).step_by(S::LANES).for_each(|at| S::store(row.load::<S>(at), out.as_mut_ptr().add(at)));
            (whole..k).for_each(|at| out[at] = row.get(at));
        }
    }
    out
}

#[cfg(target_arch = "x86_64")]
mod narrow;

#[cfg(test)]
mod tests;
