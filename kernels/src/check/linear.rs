use super::{Bench, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result, bf16,
    linear::{Blas, Linear},
    reference,
};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    let large: &[_] = if bench.quick { &[] } else { &[(1, 2048, 2048), (64, 6144, 2048), (512, 4096, 4096)] };
    for &(rows, n, k) in [(1, 16, 16), (3, 40, 24), (17, 64, 128)].iter().chain(large) {
        both(bench, rows, n, k)?;
    }
    Ok(())
}

fn both(bench: &mut Bench, rows: usize, n: usize, k: usize) -> Result<()> {
    let stream = bench.stream;
    let mut random = Random::new(7);
    let (x, weight) = (random.bf16s(rows * k, 1.0), random.bf16s(n * k, (k as f32).powf(-0.5)));
    let expected = reference::linear(&x, &weight, k);
    let shape = format!("[{rows}, {k}] x [{n}, {k}]");
    let mut blas = Blas::new(stream)?;
    let (x16, weight16) = (Buffer::from_slice(stream, &narrow(&x), "x")?, Buffer::from_slice(stream, &narrow(&weight), "weight")?);
    // Rows that are further apart than they are long, with something between.
    let stride = n + 8;
    let y = Buffer::from_slice(stream, &vec![bf16::from_f32(-7.0); rows * stride], "y")?;
    blas.linear(Linear { x: x16.view(), weight: weight16.view(), y: y.view(), stride, rows, n, k, add: false })?;
    let y = widen(&y.to_vec()?);
    let found: Vec<f32> = y.chunks_exact(stride).flat_map(|row| &row[..n]).copied().collect();
    bench.compare("linear bf16", &shape, &found, &expected, Tolerance::BF16);
    let between = y.chunks_exact(stride).all(|row| row[n..].iter().all(|&y| y == -7.0));
    bench.same("linear bf16: the stride", &shape, &between, &true);

    let (x, weight) = (Buffer::from_slice(stream, &x, "x")?, Buffer::from_slice(stream, &weight, "weight")?);
    let y = Buffer::from_slice(stream, &vec![1f32; rows * n], "y")?;
    blas.linear(Linear { x: x.view(), weight: weight.view(), y: y.view(), stride: n, rows, n, k, add: true })?;
    let expected: Vec<f32> = expected.iter().map(|y| y + 1.0).collect();
    bench.compare("linear f32, added", &shape, &y.to_vec()?, &expected, Tolerance { absolute: 3e-5, relative: 3e-5 });
    Ok(())
}
