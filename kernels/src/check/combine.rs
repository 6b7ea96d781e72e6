use super::{Bench, EPSILON, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result, bf16,
    combine::{Combine, Norm, Shared},
    linear::Float,
    reference::{self, moe},
    routing::{TokenPolicy, WeightForm},
};

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    for (tokens, slots, experts, width) in
        [(1, 1, 2, 8), (1, 8, 64, 2048), (5, 2, 8, 128), (9, 8, 8, 1004), (3, 33, 128, 24), (2, 1000, 1000, 16)]
    {
        one::<f32>(bench, tokens, slots, experts, width, |values| values.to_vec(), Tolerance::F32)?;
        one::<bf16>(bench, tokens, slots, experts, width, narrow, Tolerance::F32)?;
    }
    Ok(())
}

fn one<Y: Float>(
    bench: &mut Bench,
    tokens: usize,
    slots: usize,
    experts: usize,
    width: usize,
    of: impl Fn(&[f32]) -> Vec<Y>,
    tolerance: Tolerance,
) -> Result<()> {
    let (stream, mut random) = (bench.stream, Random::new(41));
    let kernel = if Y::IS_F32 { "combine" } else { "combine bf16" };
    // The second token is padding, and the fourth is broken.
    let policies: Vec<TokenPolicy> = (0..tokens)
        .map(|token| if token == 1 { TokenPolicy::NONE } else { TokenPolicy::top_k(slots - token % slots, WeightForm::Renorm) })
        .collect();
    let mut logits = random.normals(tokens * experts, 1.0);
    if tokens > 3 {
        logits[3 * experts] = f32::NAN;
    }
    let routing = moe::route(&logits, &policies, slots, experts);
    let plan = moe::plan(&routing, experts);
    let (x, mut y) = (random.normals(tokens * width, 1.0), random.bf16s(tokens * slots * width, 1.0));
    // Nobody reads what is behind the last row.
    y[plan.rows.len() * width..].fill(f32::NAN);
    let (shared, gate, norm) = (random.bf16s(tokens * width, 1.0), random.normals(tokens, 1.0), random.normals(width, 1.0));

    let positions = Buffer::from_slice(stream, &plan.positions, "positions")?;
    let weights = Buffer::from_slice(stream, &routing.weights, "weights")?;
    let y_there = Buffer::from_slice(stream, &of(&y), "y")?;
    let (shared_there, gate_there) = (Buffer::from_slice(stream, &of(&shared), "shared")?, Buffer::from_slice(stream, &gate, "gate")?);
    let (norm_there, normed) = (Buffer::from_slice(stream, &norm, "norm")?, Buffer::new(stream, tokens * width, "normed")?);
    for with_shared in [false, true] {
        let shape = format!("{tokens} tokens, {slots} of {experts} experts, width {width}{}", if with_shared { ", shared" } else { "" });
        let x_there = Buffer::from_slice(stream, &x, "x")?;
        let combine = Combine {
            x: x_there.view(),
            y: y_there.view(),
            positions: positions.view(),
            weights: weights.view(),
            shared: with_shared.then(|| Shared { y: shared_there.view(), gate: gate_there.view() }),
            norm: None,
            tokens,
            slots,
            width,
        };
        let expected = moe::combine(&x, &y, &plan, &routing, with_shared.then_some((&shared[..], &gate[..])), width);
        combine.launch(stream)?;
        bench.compare(kernel, &shape, &x_there.to_vec()?, &expected, tolerance);
        x_there.view().write(&x, stream)?;
        let norm_of = Norm { weight: norm_there.view(), out: normed.view(), epsilon: EPSILON };
        Combine { norm: Some(norm_of), ..combine }.launch(stream)?;
        bench.compare(kernel, format!("{shape}, with a norm"), &x_there.to_vec()?, &expected, tolerance);
        let expected = reference::rms_norm(&expected, &norm, EPSILON);
        bench.compare(kernel, format!("{shape}: the norm"), &widen(&normed.to_vec()?), &expected, Tolerance::BF16);
    }
    Ok(())
}
