//! All forms of all weights against sums in f64, over a table of shapes, and the promises about order.

use half::bf16;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::ops::cpu::{Q8_BLOCK, quantize_q8};

/// Weights in all three types, with what they are worth as f32.
struct Weights {
    rows: usize,
    k: usize,
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    integers: Vec<i8>,
    scales: Vec<bf16>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    F32,
    Bf16,
    Q8,
}

const TYPES: [Type; 3] = [Type::F32, Type::Bf16, Type::Q8];

impl Weights {
    fn random(rows: usize, k: usize, rng: &mut StdRng) -> Self {
        let f32s: Vec<f32> = (0..rows * k).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (mut integers, mut scales) = (vec![0; rows * k], vec![bf16::ZERO; rows * k.div_ceil(Q8_BLOCK)]);
        quantize_q8(&f32s, k, &mut integers, &mut scales);
        Self { rows, k, bf16s: f32s.iter().map(|&w| bf16::from_f32(w)).collect(), f32s, integers, scales }
    }

    fn matrix(&self, kind: Type) -> Matrix<'_> {
        let data = match kind {
            Type::F32 => Data::F32(&self.f32s),
            Type::Bf16 => Data::Bf16(&self.bf16s),
            Type::Q8 => Data::Q8 { values: &self.integers, scales: &self.scales },
        };
        Matrix::new(data, self.rows, self.k)
    }

    fn value(&self, kind: Type, row: usize, i: usize) -> f64 {
        let at = row * self.k + i;
        match kind {
            Type::F32 => f64::from(self.f32s[at]),
            Type::Bf16 => self.bf16s[at].to_f64(),
            Type::Q8 => f64::from(self.integers[at]) * self.scales[row * self.k.div_ceil(Q8_BLOCK) + i / Q8_BLOCK].to_f64(),
        }
    }
}

fn arithmetics() -> Vec<Arithmetic> {
    let mut all = Vec::new();
    for reduction in [Reduction::Fastest, Reduction::BatchInvariant] {
        all.push(Arithmetic::portable(reduction));
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                all.push(Arithmetic { isa: Isa::Avx2, bf16: Bf16Unit::None, reduction });
            }
            if Isa::detect() == Isa::Avx512 {
                all.push(Arithmetic { isa: Isa::Avx512, bf16: Bf16Unit::None, reduction });
                if Bf16Unit::detect() != Bf16Unit::None {
                    all.push(Arithmetic { isa: Isa::Avx512, bf16: Bf16Unit::Avx512, reduction });
                }
                if Bf16Unit::detect() == Bf16Unit::Amx {
                    all.push(Arithmetic { isa: Isa::Avx512, bf16: Bf16Unit::Amx, reduction });
                }
            }
        }
    }
    all
}

/// How far a sum of `k` products may be off, relative to the sum of their absolute values.
fn tolerance(arithmetic: Arithmetic, kind: Type) -> f64 {
    match kind {
        Type::F32 => 1e-6,
        // With a bf16 unit activations are rounded, 2^-9 of each, and 8-bit weights as well.
        _ if arithmetic.bf16 != Bf16Unit::None => 1.0 / 128.0,
        // Few rows meet 8-bit weights as 16-bit integers: 2^-16 of the largest of a block.
        Type::Q8 if arithmetic.reduction == Reduction::Fastest && arithmetic.isa == Isa::detect() => 3e-5,
        Type::Bf16 | Type::Q8 => 1e-6,
    }
}

fn random(count: usize, rng: &mut StdRng) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

#[test]
fn linear_is_a_sum_of_products() {
    let mut rng = StdRng::seed_from_u64(1);
    for (rows, k, n) in [
        (1, 1, 1),
        (1, 64, 32),
        (2, 33, 7),
        (3, 31, 4),
        (5, 96, 48),
        (8, 64, 16),
        (9, 64, 16),
        (17, 32, 80),
        (40, 128, 112),
        (70, 45, 19),
        (130, 64, 144),
        (1, 1000, 33),
        (3, 544, 48),
        (5, 513, 7),
        (8, 2080, 16),
        (33, 32, 1040),
        (50, 64, 800),
    ] {
        let weights = Weights::random(n, k, &mut rng);
        let x = random(rows * k, &mut rng);
        for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
            let mut out = vec![0.5; rows * (n + 3)];
            let product = Product { weights: weights.matrix(kind), rows: 0..rows, column: 2 };
            let output = Output { values: &mut out, stride: n + 3, store: Store::Add };
            arithmetic.linear(&mut Scratch::default(), Input { x: &x, k, source: None }, &[product], output);
            for (row, column) in (0..rows).flat_map(|row| (0..n).map(move |column| (row, column))) {
                let terms = (0..k).map(|i| f64::from(x[row * k + i]) * weights.value(kind, column, i));
                let (wanted, size) = terms.fold((0.5, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let found = f64::from(out[row * (n + 3) + 2 + column]);
                assert!(
                    (found - wanted).abs() <= tolerance(arithmetic, kind) * (size + 1.0),
                    "{arithmetic:?} {kind:?} {rows} {k} {n}: {found} {wanted}"
                );
            }
            for row in out.chunks_exact(n + 3) {
                assert_eq!((row[0], row[1], row[n + 2]), (0.5, 0.5, 0.5), "columns of others");
            }
        }
    }
}

#[test]
fn products_share_a_call() {
    let mut rng = StdRng::seed_from_u64(2);
    let k = 64;
    let weights: Vec<Weights> = [32, 16, 48].iter().map(|&n| Weights::random(n, k, &mut rng)).collect();
    for rows in [3, 21] {
        let x = random(rows * k, &mut rng);
        for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
            let products: Vec<Product<'_>> =
                [0, 32, 48].iter().zip(&weights).map(|(&column, w)| Product { weights: w.matrix(kind), rows: 0..rows, column }).collect();
            let mut together = vec![0.0; rows * 96];
            let input = Input { x: &x, k, source: None };
            arithmetic.linear(&mut Scratch::default(), input, &products, Output { values: &mut together, stride: 96, store: Store::Set });
            for product in products {
                let n = product.weights.rows();
                let mut alone = vec![0.0; rows * n];
                let one = Product { column: 0, ..product.clone() };
                arithmetic.linear(&mut Scratch::default(), input, &[one], Output { values: &mut alone, stride: n, store: Store::Set });
                for row in 0..rows {
                    assert_eq!(together[row * 96 + product.column..][..n], alone[row * n..][..n]);
                }
            }
        }
    }
}

/// Experts with no, few and many rows in one call, gathered from anywhere.
#[test]
fn experts_are_two_products() {
    let mut rng = StdRng::seed_from_u64(3);
    for (d, f) in [(64, 96), (32, 32), (33, 17), (48, 40), (2, 3)] {
        let sizes = [0, 1, 37, 0, 8, 9, 16, 3];
        let total: usize = sizes.iter().sum();
        let tokens = 20;
        let x = random(tokens * d, &mut rng);
        let source: Vec<u32> = (0..total).map(|row| (row * 7 % tokens) as u32).collect();
        let weights: Vec<(Weights, Weights)> =
            sizes.iter().map(|_| (Weights::random(2 * f, d, &mut rng), Weights::random(d, f, &mut rng))).collect();
        for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
            let mut end = 0;
            let experts: Vec<Expert<'_>> = weights
                .iter()
                .zip(sizes)
                .map(|((gate_up, down), rows)| {
                    end += rows;
                    Expert { gate_up: gate_up.matrix(kind), down: down.matrix(kind), rows: end - rows..end }
                })
                .collect();
            let mut out = vec![0.0; total * d];
            arithmetic.experts(&mut Scratch::default(), Input { x: &x, k: d, source: Some(&source) }, &experts, &mut out);
            for (expert, (gate_up, down)) in experts.iter().zip(&weights) {
                for row in expert.rows.clone() {
                    let x = &x[source[row] as usize * d..][..d];
                    let of = |w: &Weights, r: usize, x: &[f64]| x.iter().enumerate().map(|(i, x)| x * w.value(kind, r, i)).sum::<f64>();
                    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                    let hidden: Vec<f64> = (0..f)
                        .map(|c| {
                            let (gate, up) = (of(gate_up, c, &x), of(gate_up, f + c, &x));
                            gate / (1.0 + (-gate).exp()) * up
                        })
                        .collect();
                    let scale: f64 = 1.0 + hidden.iter().map(|h| h.abs()).sum::<f64>() + (d as f64).sqrt();
                    for column in 0..d {
                        let (wanted, found) = (of(down, column, &hidden), f64::from(out[row * d + column]));
                        assert!(
                            (found - wanted).abs() <= 2.0 * tolerance(arithmetic, kind) * scale,
                            "{arithmetic:?} {kind:?} {d} {f} row {row}: {found} {wanted}"
                        );
                    }
                }
            }
        }
    }
}

/// The promise of [`Reduction::BatchInvariant`], and that the fast order keeps it among few rows.
#[test]
fn a_row_gets_the_same_bits_in_any_company() {
    let mut rng = StdRng::seed_from_u64(4);
    for (k, n) in [(64, 48), (33, 10), (96, 32)] {
        let weights = Weights::random(n, k, &mut rng);
        let x = random(50 * k, &mut rng);
        for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
            let run = |rows: Range<usize>| {
                let mut out = vec![0.0; rows.len() * n];
                let input = Input { x: &x[rows.start * k..rows.end * k], k, source: None };
                let product = Product { weights: weights.matrix(kind), rows: 0..rows.len(), column: 0 };
                arithmetic.linear(&mut Scratch::default(), input, &[product], Output { values: &mut out, stride: n, store: Store::Set });
                out
            };
            let most = if arithmetic.reduction == Reduction::Fastest { FEW_Q8_BEFORE_TILES } else { 50 };
            let whole = run(0..most);
            for rows in [0..1, 1..3, 1..most.min(17), most - 1..most] {
                assert_eq!(run(rows.clone()), whole[rows.start * n..rows.end * n], "{arithmetic:?} {kind:?} {rows:?}");
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut rng = StdRng::seed_from_u64(5);
    let (d, f, rows) = (64, 256, 70);
    let (gate_up, down) = (Weights::random(2 * f, d, &mut rng), Weights::random(d, f, &mut rng));
    let x = random(rows * d, &mut rng);
    for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut out = vec![0.0; rows * d];
                let experts: Vec<Expert<'_>> =
                    [0..40, 40..67, 67..70].map(|rows| Expert { gate_up: gate_up.matrix(kind), down: down.matrix(kind), rows }).into();
                arithmetic.experts(&mut Scratch::default(), Input { x: &x, k: d, source: None }, &experts, &mut out);
                out
            })
        };
        assert_eq!(run(1), run(3), "{arithmetic:?} {kind:?}");
    }
}

/// A token that is not finite must not reach the tokens of its block.
#[test]
fn what_is_not_finite_stays_in_its_row() {
    let mut rng = StdRng::seed_from_u64(6);
    let (k, n) = (64, 32);
    let weights = Weights::random(n, k, &mut rng);
    for rows in [1, 2, 3, 8, 20] {
        let mut x = random(rows * k, &mut rng);
        let (nan, infinite) = (rows / 3, rows / 2);
        x[nan * k + 3] = f32::NAN;
        x[infinite * k + 5] = f32::INFINITY;
        for (arithmetic, kind) in arithmetics().into_iter().flat_map(|a| TYPES.map(|kind| (a, kind))) {
            let mut out = vec![0.0; rows * n];
            let product = Product { weights: weights.matrix(kind), rows: 0..rows, column: 0 };
            arithmetic.linear(
                &mut Scratch::default(),
                Input { x: &x, k, source: None },
                &[product],
                Output { values: &mut out, stride: n, store: Store::Set },
            );
            for (row, values) in out.chunks_exact(n).enumerate() {
                assert_eq!(values.iter().all(|v| v.is_finite()), row != nan && row != infinite, "{arithmetic:?} {kind:?} {row}");
            }
        }
    }
}

#[test]
fn eight_bits_are_within_half_a_scale() {
    let mut rng = StdRng::seed_from_u64(7);
    for k in [1, 31, 32, 33, 100] {
        let weights = Weights::random(3, k, &mut rng);
        for row in 0..3 {
            for i in 0..k {
                let scale = weights.scales[row * k.div_ceil(Q8_BLOCK) + i / Q8_BLOCK].to_f64();
                let error = (weights.value(Type::Q8, row, i) - weights.value(Type::F32, row, i)).abs();
                assert!(error <= 0.5001 * scale, "{error} of {scale}");
            }
        }
    }
    let (mut values, mut scales) = ([9i8; 32], [bf16::ONE; 1]);
    quantize_q8(&[0.0; 32], 32, &mut values, &mut scales);
    assert_eq!((values, scales), ([0; 32], [bf16::ZERO]));
    // What is no number is not served as one.
    for bad in [f32::NAN, f32::INFINITY] {
        let mut weights = [0.5; 32];
        weights[7] = bad;
        quantize_q8(&weights, 32, &mut values, &mut scales);
        assert!(scales[0].is_nan());
    }
    quantize_q8(&[1e-40; 32], 32, &mut values, &mut scales);
    assert!((f64::from(values[0]) * scales[0].to_f64()).abs() <= 1e-40_f32.into());
}

/// The writes are unchecked: what does not partition the output must not get to them.
#[test]
fn products_that_overlap_are_refused() {
    let weights = vec![1f32; 6];
    let matrix = || Matrix::new(Data::F32(&weights), 2, 3);
    let cases: [[(Range<usize>, usize); 2]; 4] =
        [[(0..2, 0), (1..3, 0)], [(0..2, 0), (0..2, 1)], [(2..3, 0), (0..2, 0)], [(0..4, 0), (4..5, 0)]];
    for ranges in cases {
        let products: Vec<Product<'_>> =
            ranges.iter().map(|(rows, column)| Product { weights: matrix(), rows: rows.clone(), column: *column }).collect();
        let run = || {
            let mut out = vec![0.0; 12];
            let input = Input { x: &[1.0; 12], k: 3, source: None };
            Arithmetic::portable(Reduction::Fastest).linear(
                &mut Scratch::default(),
                input,
                &products,
                Output { values: &mut out, stride: 3, store: Store::Set },
            );
        };
        assert!(std::panic::catch_unwind(run).is_err(), "{ranges:?}");
    }
}
