use super::{Bench, narrow};
use crate::{Buffer, Result, bf16, fill, reference};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    // Over the end of a generator's indices.
    for (len, seed) in [(1, 0), (1000, 7), ((1 << 16) + 77, u64::MAX)] {
        let (stream, shape) = (bench.stream, format!("[{len}], seed {seed}"));
        let expected: Vec<f32> = (0..len as u64).map(|index| 0.37 * reference::normal(seed, index)).collect();
        let (wide, short) = (Buffer::<f32>::new(stream, len, "numbers")?, Buffer::<bf16>::new(stream, len, "numbers")?);
        fill::normal(wide.view(), seed, 0.37, stream)?;
        fill::normal(short.view(), seed, 0.37, stream)?;
        bench.same("fill_normal f32", &shape, &wide.to_vec()?, &expected);
        bench.same("fill_normal bf16", &shape, &short.to_vec()?, &narrow(&expected));
        fill::value(wide.view(), 1.3, stream)?;
        fill::value(short.view(), 1.3, stream)?;
        bench.same("fill_value f32", &shape, &wide.to_vec()?, &vec![1.3; len]);
        bench.same("fill_value bf16", &shape, &short.to_vec()?, &vec![bf16::from_f32(1.3); len]);
    }
    Ok(())
}
