//! A vectorisable `exp`.

/// `exp(x)` within 2 units in the last place, without branches, so that loops over it become vector code.
///
/// Below -87.3 it returns the smallest value of the range (1.2e-38) instead of a denormal or 0, above 88.3 the largest; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, so that x - n ln 2 loses nothing.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2].
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let p = p * r * r + r + 1.0;
    // The low bits of `shifted` hold n: put it into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    p * power
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn agrees_with_the_library() {
        let worst = (-87_000..88_000).map(|i| i as f32 * 1e-3).fold(0f32, |worst, x| {
            let (found, wanted) = (exp(x), f64::from(x).exp());
            worst.max(((f64::from(found) - wanted) / wanted).abs() as f32)
        });
        assert!(worst < 2.5e-7, "relative error {worst}");
    }

    #[test]
    fn extremes() {
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38 && exp(-1e30) < 1.3e-38);
        assert!(exp(f32::INFINITY).is_finite() && exp(1e30) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }
}
