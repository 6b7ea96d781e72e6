//! Random numbers of tasks and initial weights: few lines of our own, so that no library's update changes results.

/// A sequence of random numbers: splitmix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
    /// The second of the last pair of normal numbers.
    spare: Option<f64>,
}

impl Random {
    /// The sequence of `seed` for one `purpose`: different purposes of one seed are independent.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let hashed = purpose.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut random = Self { state: hashed ^ seed.wrapping_mul(0xd134_2543_de82_ef95), spare: None };
        random.bits();
        random
    }

    /// As [`Self::new`], for one step of a run: a step can be drawn without those before it.
    pub fn of_step(seed: u64, purpose: &str, step: usize) -> Self {
        let mut random = Self::new(seed, purpose);
        random.state ^= (step as u64 + 1).wrapping_mul(0xda94_2042_e4dd_58b5);
        random.bits();
        random
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Uniform below `bound`, which must not be 0.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.bits()) * bound as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    /// `n` normal numbers with standard deviation `std`.
    pub fn normals(&mut self, n: usize, std: f64) -> Vec<f64> {
        (0..n).map(|_| std * self.normal()).collect()
    }

    /// A permutation of `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_a_normal() {
        let mut random = Random::new(7, "test");
        let n = 100_000;
        let values = random.normals(n, 1.0);
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        // Four standard errors.
        assert!(mean.abs() < 4.0 / (n as f64).sqrt(), "{mean}");
        assert!((variance - 1.0).abs() < 4.0 * (2.0 / n as f64).sqrt(), "{variance}");
    }

    #[test]
    fn seeds_and_purposes_differ_and_repeat() {
        let first = |seed, purpose| Random::new(seed, purpose).bits();
        assert_eq!(first(1, "data"), first(1, "data"));
        assert_ne!(first(1, "data"), first(2, "data"));
        assert_ne!(first(1, "data"), first(1, "init"));
        let mut order = Random::new(3, "order").permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
