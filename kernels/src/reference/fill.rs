/// A nearly normal number, mean 0 and variance 1, for each seed and index: the sum of four uniform numbers of 16 bits, which are those of a generator for
/// each 2^16 indices.
pub fn normal(seed: u64, index: u64) -> f32 {
    let state = mix(seed.wrapping_add(index >> 16)).wrapping_add(((index & 0xffff) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bits = mix(state);
    let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
    // Mean 4 · 65535 / 2; variance 4 · 65536² / 12.
    (sum as f32 - 131_070.0) * (1.0 / 37_837.227)
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
