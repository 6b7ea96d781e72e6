use super::{Bench, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result, Stream, bf16,
    experts::{Dispatch, Down, GateUp, Quantize, Weights, scales_len, stream_linear},
    linear::{Float, Linear},
    reference::{self, e4m3, moe},
};

/// Products of bf16, accumulated in f32, that stay f32.
const PRODUCT: Tolerance = Tolerance { absolute: 3e-5, relative: 3e-5 };

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    let large: &[_] = if bench.quick {
        &[]
    } else {
        &[(1, 8, 64, 2048, 1024), (64, 8, 64, 2048, 1024), (16, 8, 128, 2048, 768), (8, 2, 8, 4096, 14_336)]
    };
    let shapes = [
        (1, 1, 2, 16, 16),
        (1, 2, 8, 128, 128),
        (3, 2, 8, 136, 24),
        (9, 2, 2, 24, 136),
        (17, 1, 5, 264, 40),
        (33, 2, 2, 128, 48),
        (5, 8, 60, 32, 16),
        (70, 1, 1, 64, 16),
        (12, 3, 1000, 16, 16),
        (2, 1, 4, 1032, 600),
        (3, 2, 3, 48, 144),
        (20, 2, 2, 144, 80),
        (1, 2, 3, 2048, 32),
    ];
    for &(tokens, slots, experts, width, expert_width) in shapes.iter().chain(large) {
        let shape = Shape { tokens, slots, experts, width, expert_width };
        shape.check(bench, false)?;
        if width % 16 == 0 && expert_width % 16 == 0 {
            shape.check(bench, true)?;
        }
    }
    let large: &[_] = if bench.quick { &[] } else { &[(1, 6144, 2048), (64, 50_304, 2048), (33, 2048, 2048)] };
    for &(rows, n, k) in [(1, 16, 8), (3, 40, 24), (17, 100, 128), (70, 64, 136), (2, 8480, 16), (33, 33, 1032)].iter().chain(large) {
        dense(bench, rows, n, k)?;
    }
    for (experts, n, k) in [(1, 16, 16), (2, 136, 24), (1, 128, 300), (3, 130, 129)] {
        quantize(bench, experts, n, k)?;
    }
    neighbours(bench, false)?;
    neighbours(bench, true)?;
    every_value(bench)
}

/// The same row again and again, as many as take every path through the kernel: each gives what one alone gives.
fn neighbours(bench: &mut Bench, e4m3: bool) -> Result<()> {
    const WIDTH: usize = 64;
    const EXPERT_WIDTH: usize = 400;
    let (kernel, stream) = (if e4m3 { "down e4m3: a row alone" } else { "down: a row alone" }, bench.stream);
    let mut random = Random::new(41);
    let row = random.bf16s(EXPERT_WIDTH, 1.0);
    let down = Stack::new(&mut random, stream, (1, WIDTH, EXPERT_WIDTH), e4m3)?;
    let mut alone = Vec::new();
    for tokens in [1, 8, 9, 17, 33, 70] {
        let plan = moe::plan(&moe::Routing { expert_ids: vec![0; tokens], weights: vec![1.0; tokens], ..Default::default() }, 1);
        let (active, rows) = (Buffer::from_slice(stream, &plan.active, "active")?, Buffer::from_slice(stream, &plan.rows, "rows")?);
        let hidden = Buffer::from_slice(stream, &narrow(&row.repeat(tokens)), "hidden")?;
        let y = Buffer::from_slice(stream, &vec![-7f32; tokens * WIDTH], "y")?;
        let dispatch = Dispatch { active: active.view(), rows: rows.view(), tokens, slots: 1, experts: 1 };
        Down { hidden: hidden.view(), weights: down.weights(), y: y.view(), dispatch, width: WIDTH, expert_width: EXPERT_WIDTH }
            .launch(stream)?;
        let found = y.to_vec()?;
        if alone.is_empty() {
            alone.clone_from(&found);
        }
        bench.same(kernel, format!("{tokens} rows"), &found, &alone.repeat(tokens));
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    slots: usize,
    experts: usize,
    width: usize,
    expert_width: usize,
}

impl Shape {
    fn check(self, bench: &mut Bench, e4m3: bool) -> Result<()> {
        let Self { tokens, slots, experts, width, expert_width } = self;
        let (kernel, stream) = (if e4m3 { ("gate_up e4m3", "down e4m3") } else { ("gate_up", "down") }, bench.stream);
        let shape = format!("{tokens} tokens, {slots} of {experts} experts, [{width}, {expert_width}]");
        let mut random = Random::new(29);
        let x = random.bf16s(tokens * width, 1.0);
        let gate_up = Stack::new(&mut random, stream, (experts, 2 * expert_width, width), e4m3)?;
        let down = Stack::new(&mut random, stream, (experts, width, expert_width), e4m3)?;
        let plan = self.plan(&mut random);
        let rows = plan.rows.len();

        let gathered: Vec<f32> = plan.rows.iter().flat_map(|&slot| &x[slot as usize / slots * width..][..width]).copied().collect();
        let products = moe::grouped_linear(&gathered, &gate_up.values, &plan.offsets, width);
        let expected = moe::silu_mul(&products, expert_width);
        let x = Buffer::from_slice(stream, &narrow(&x), "x")?;
        let (active, slots_of_rows) = (Buffer::from_slice(stream, &plan.active, "active")?, Buffer::new(stream, tokens * slots, "rows")?);
        slots_of_rows.view().write(&plan.rows, stream)?;
        let dispatch = Dispatch { active: active.view(), rows: slots_of_rows.view(), tokens, slots, experts };
        let hidden = Buffer::from_slice(stream, &vec![bf16::from_f32(-7.0); tokens * slots * expert_width], "hidden")?;
        let arguments = GateUp { x: x.view(), weights: gate_up.weights(), hidden: hidden.view(), dispatch, width, expert_width };
        arguments.launch(stream)?;
        let found = widen(&hidden.to_vec()?);
        let (made, behind) = found.split_at(rows * expert_width);
        bench.compare(kernel.0, &shape, made, &expected, Tolerance::BF16);
        bench.same(kernel.0, format!("{shape}: what is behind"), &behind.iter().all(|&h| h == -7.0), &true);

        let expected = moe::grouped_linear(made, &down.values, &plan.offsets, expert_width);
        let y = Buffer::from_slice(stream, &vec![-7f32; tokens * slots * width], "y")?;
        Down { hidden: hidden.view(), weights: down.weights(), y: y.view(), dispatch, width, expert_width }.launch(stream)?;
        bench.compare(kernel.1, &shape, &y.to_vec()?[..rows * width], &expected, PRODUCT);
        let y = Buffer::<bf16>::new(stream, tokens * slots * width, "y")?;
        Down { hidden: hidden.view(), weights: down.weights(), y: y.view(), dispatch, width, expert_width }.launch(stream)?;
        bench.compare(kernel.1, format!("{shape} to bf16"), &widen(&y.to_vec()?)[..rows * width], &expected, Tolerance::BF16);
        Ok(())
    }

    /// Experts of all slots, some of them unused; half of the experts have no rows where there are many.
    fn plan(self, random: &mut Random) -> moe::Plan {
        let drawn = if self.experts > 4 { self.experts.div_ceil(2) } else { self.experts };
        let unused = |slot: usize| slot % 11 == 7;
        let expert = |slot| if unused(slot) { self.experts } else { random.below(drawn) * (self.experts / drawn) };
        let slots = self.tokens * self.slots;
        let routing = moe::Routing {
            expert_ids: (0..slots).map(expert).map(|e| e as u32).collect(),
            weights: vec![0.5; slots],
            ..Default::default()
        };
        moe::plan(&routing, self.experts)
    }
}

/// Weights of all experts, here and on the device.
struct Stack {
    values: Vec<f32>,
    bf16: Buffer<bf16>,
    e4m3: Option<(Buffer<u8>, Buffer<f32>)>,
}

impl Stack {
    fn new(random: &mut Random, stream: Stream, (experts, n, k): (usize, usize, usize), e4m3: bool) -> Result<Self> {
        let values = random.bf16s(experts * n * k, (k as f32).powf(-0.5));
        let bf16 = Buffer::from_slice(stream, &narrow(&values), "weights")?;
        if !e4m3 {
            return Ok(Self { values, bf16, e4m3: None });
        }
        let (bits, scales) = (Buffer::new(stream, values.len(), "weights")?, Buffer::new(stream, scales_len(experts, n, k), "scales")?);
        Quantize { weight: bf16.view(), values: bits.view(), scales: scales.view(), experts, n, k }.launch(stream)?;
        Ok(Self { values: e4m3::widen(&bits.to_vec()?, &scales.to_vec()?, n, k), bf16, e4m3: Some((bits, scales)) })
    }

    fn weights(&self) -> Weights<'_> {
        match &self.e4m3 {
            None => Weights::Bf16(self.bf16.view()),
            Some((values, scales)) => Weights::E4m3 { values: values.view(), scales: scales.view() },
        }
    }
}

fn dense(bench: &mut Bench, rows: usize, n: usize, k: usize) -> Result<()> {
    let (stream, shape) = (bench.stream, format!("[{rows}, {k}] x [{n}, {k}]"));
    let mut random = Random::new(31);
    let (x, weight) = (random.bf16s(rows * k, 1.0), random.bf16s(n * k, (k as f32).powf(-0.5)));
    let expected = reference::linear(&x, &weight, k);
    let (x, weight) = (Buffer::from_slice(stream, &narrow(&x), "x")?, Buffer::from_slice(stream, &narrow(&weight), "weight")?);
    let product = Product { stream, x: &x, weight: &weight, rows, n, k };
    let found = product.launch(bf16::from_f32(-7.0), false)?;
    bench.compare("stream_linear bf16", &shape, &widen(&found), &expected, Tolerance::BF16);
    bench.compare("stream_linear f32", &shape, &product.launch(-7f32, false)?, &expected, PRODUCT);
    let added: Vec<f32> = expected.iter().map(|y| y - 7.0).collect();
    bench.compare("stream_linear f32, added", &shape, &product.launch(-7f32, true)?, &added, PRODUCT);
    // A row is the same whatever is beside it.
    let alone = Product { rows: 1, ..product }.launch(0f32, false)?;
    bench.same("stream_linear: a row alone", &shape, &alone[..], &product.launch(0f32, false)?[..n]);
    Ok(())
}

#[derive(Clone, Copy)]
struct Product<'a> {
    stream: Stream,
    x: &'a Buffer<bf16>,
    weight: &'a Buffer<bf16>,
    rows: usize,
    n: usize,
    k: usize,
}

impl Product<'_> {
    /// Into rows that are further apart than they are long.
    fn launch<Y: Float>(self, before: Y, add: bool) -> Result<Vec<Y>> {
        let Self { stream, x, weight, rows, n, k } = self;
        let stride = n + 3;
        let y = Buffer::from_slice(stream, &vec![before; rows * stride], "y")?;
        stream_linear(Linear { x: x.view(), weight: weight.view(), y: y.view(), stride, rows, n, k, add }, stream)?;
        Ok(y.to_vec()?.chunks_exact(stride).flat_map(|row| &row[..n]).copied().collect())
    }
}

fn quantize(bench: &mut Bench, experts: usize, n: usize, k: usize) -> Result<()> {
    let (stream, shape) = (bench.stream, format!("[{experts}, {n}, {k}]"));
    let mut weight = Random::new(37).bf16s(experts * n * k, 0.02);
    let mut one = |weight: &[f32], shape: String| -> Result<()> {
        let (values, scales) = e4m3::quantize_blocks(weight, experts, n, k);
        let weight = Buffer::from_slice(stream, &narrow(weight), "weight")?;
        let found = (Buffer::new(stream, experts * n * k, "values")?, Buffer::new(stream, scales_len(experts, n, k), "scales")?);
        Quantize { weight: weight.view(), values: found.0.view(), scales: found.1.view(), experts, n, k }.launch(stream)?;
        bench.same("quantize_blocks", &shape, &found.0.to_vec()?, &values);
        bench.compare("quantize_blocks: scales", shape, &found.1.to_vec()?, &scales, Tolerance::F32);
        Ok(())
    };
    one(&weight, shape.clone())?;
    one(&vec![0.0; weight.len()], format!("{shape} of zeros"))?;
    weight[0] = f32::NEG_INFINITY;
    if let Some(last) = weight.last_mut() {
        *last = f32::NAN;
    }
    one(&weight, format!("{shape} with what is not finite"))
}

/// All of e4m3 but NaN, each alone in its product.
fn every_value(bench: &mut Bench) -> Result<()> {
    let stream = bench.stream;
    let bits: Vec<u8> = (0..=255u8).filter(|bits| bits & 0x7f != 0x7f).chain([0, 0]).collect();
    let expected: Vec<f32> = bits.iter().map(|&bits| e4m3::decode(bits)).collect();
    // [256, 16]: a value in one column of each row.
    let mut weight = vec![0u8; 256 * 16];
    bits.iter().enumerate().for_each(|(row, &bits)| weight[row * 16 + row % 16] = bits);
    let weight = Buffer::from_slice(stream, &weight, "weight")?;
    let scales = Buffer::from_slice(stream, &[1f32; 2], "scales")?;
    let hidden = Buffer::from_slice(stream, &[bf16::ONE; 16], "hidden")?;
    let active = Buffer::from_slice(stream, &[0u32, 0, 1, 0], "active")?;
    let rows = Buffer::from_slice(stream, &[0u32], "rows")?;
    let y = Buffer::<f32>::new(stream, 256, "y")?;
    let dispatch = Dispatch { active: active.view(), rows: rows.view(), tokens: 1, slots: 1, experts: 1 };
    let weights = Weights::E4m3 { values: weight.view(), scales: scales.view() };
    Down { hidden: hidden.view(), weights, y: y.view(), dispatch, width: 256, expert_width: 16 }.launch(stream)?;
    bench.compare("down e4m3", "every value", &y.to_vec()?, &expected, Tolerance { absolute: 0.0, relative: 0.0 });
    Ok(())
}
