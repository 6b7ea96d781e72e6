/// Numbers for checks: SplitMix64, the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal, with this deviation: a sum of uniform numbers.
    pub fn normal(&mut self, deviation: f32) -> f32 {
        ((0..12).map(|_| self.unit()).sum::<f32>() - 6.0) * deviation
    }

    /// As many of [`Random::normal`].
    pub fn normals(&mut self, len: usize, deviation: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal(deviation)).collect()
    }

    /// As many of [`Random::normal`], each of which bf16 has.
    pub fn bf16s(&mut self, len: usize, deviation: f32) -> Vec<f32> {
        (0..len).map(|_| half::bf16::from_f32(self.normal(deviation)).to_f32()).collect()
    }
}
