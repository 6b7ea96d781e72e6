use super::{Bench, Random};
use crate::{
    Buffer, Result,
    limits::{self, copy, read},
};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    let tile = limits::tile_bytes() / size_of::<u32>();
    // Fewer tiles than blocks, and more.
    for (tiles, blocks) in [(1, 3), (7, 3)] {
        let (stream, shape) = (bench.stream, format!("{tiles} tiles, {blocks} blocks"));
        let mut random = Random::new(9);
        let words: Vec<u32> = (0..tiles * tile).map(|_| random.bits() as u32).collect();
        let (from, to) = (Buffer::from_slice(stream, &words, "from")?, Buffer::<u32>::new(stream, words.len(), "to")?);
        let sums = Buffer::<u32>::new(stream, blocks, "sums")?;
        copy(from.view(), to.view(), blocks, stream)?;
        read(from.view(), sums.view(), stream)?;
        bench.same("stream_copy", &shape, &to.to_vec()?, &words);
        let sum = |words: &[u32]| words.iter().fold(0, |sum, word| sum ^ word);
        bench.same("stream_read", &shape, &sum(&sums.to_vec()?), &sum(&words));
        bench.same("stream_read: whole tiles only", &shape, &read(from.view().part(1..), sums.view(), stream).is_err(), &true);
    }
    Ok(())
}
