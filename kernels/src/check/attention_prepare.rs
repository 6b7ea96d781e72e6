//! What makes the operands of attention.

use super::{Bench, EPSILON, Random, Tolerance, narrow, widen};
use crate::{
    Buffer, Result,
    attention::{Cache, Heads, Prepare, QkNorm},
    bf16,
    reference::{self, Paged, Shaping},
};

/// What lies where nothing must be written.
const UNTOUCHED: f32 = -7.0;

/// What is done to tokens of a model, but for their numbers.
#[derive(Clone, Copy, Debug)]
struct Model {
    heads: Heads,
    bias: bool,
    /// 0: none, 1: of each head, 2: of all.
    norm: usize,
    clip: Option<f32>,
    block_tokens: usize,
    rope_scale: f32,
}

pub(super) fn check(bench: &mut Bench) -> Result<()> {
    for (i, (heads, kv_heads, head_dim)) in
        [(1, 1, 8), (4, 2, 32), (3, 3, 40), (8, 1, 64), (6, 2, 96), (32, 4, 128), (5, 5, 256), (40, 8, 72)].into_iter().enumerate()
    {
        for norm in 0..3 {
            let heads = Heads { heads, kv_heads, head_dim };
            let (bias, clip) = ((i + norm) % 2 == 0, (norm + i / 2) % 3 == 1);
            let (block_tokens, rope_scale) = ([1, 4, 16, 64, 256][(i + norm) % 5], [1.0, 1.3][i % 2]);
            prepare_model(bench, Model { heads, bias, norm, clip: clip.then_some(1.25), block_tokens, rope_scale })?;
        }
    }
    Ok(())
}

/// Tokens at the beginning, within and at the far end of sequences, two that are none, and one of NaN.
fn prepare_model(bench: &mut Bench, model: Model) -> Result<()> {
    let (stream, mut random) = (bench.stream, Random::new(13));
    let Model { heads: shape, block_tokens, rope_scale, .. } = model;
    let Heads { heads, kv_heads, head_dim } = shape;
    let (sequences, blocks, longest) = (3, 7, 1_000_000);
    let places = [(0, 0), (u32::MAX, 0), (1, 1), (0, 17), (2, 999_999), (1, 131_071), (2, 65_537), (u32::MAX, 9), (2, 30)];
    let tokens = places.len();
    let (sequence, position): (Vec<u32>, Vec<u32>) = places.into_iter().unzip();
    let stride = (longest as usize).div_ceil(block_tokens);
    // No two of the tokens lie at one place.
    let table: Vec<u32> = (0..sequences * stride).map(|i| ((i % stride % 7 * 3 + i / stride) % blocks) as u32).collect();

    let (width, q_width, kv_width) = (shape.qkv_width(), heads * head_dim, kv_heads * head_dim);
    let mut qkv = random.bf16s(tokens * width, 1.0);
    qkv[3 * width..][..3].fill(f32::NAN);
    qkv[4 * width - 1] = f32::NAN;
    let bias = [q_width, kv_width, kv_width].map(|width| random.normals(width, 0.5));
    let norms = [heads, kv_heads].map(|heads| random.normals(if model.norm == 2 { heads * head_dim } else { head_dim }, 1.0));
    let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();

    let row = kv_heads * block_tokens * head_dim;
    let mut expected = [tokens * q_width, blocks * row, blocks * row].map(|len| vec![UNTOUCHED; len]);
    for (token, (&sequence, &position)) in sequence.iter().zip(&position).enumerate() {
        if sequence == u32::MAX {
            continue;
        }
        let (q, rest) = qkv[token * width..(token + 1) * width].split_at(q_width);
        let (k, v) = rest.split_at(kv_width);
        let with = |i: usize, rotated: bool| Shaping {
            bias: model.bias.then_some(&bias[i]),
            norm: (rotated && model.norm > 0).then(|| &norms[i][..]),
            epsilon: EPSILON,
            clip: model.clip,
            rope: rotated.then_some((&frequencies, rope_scale)),
        };
        expected[0][token * q_width..(token + 1) * q_width].copy_from_slice(&reference::shape_token(q, position, with(0, true)));
        let table = &table[sequence as usize * stride..];
        for (i, new) in [(1, reference::shape_token(k, position, with(1, true))), (2, reference::shape_token(v, position, with(2, false)))]
        {
            for (head, new) in new.chunks_exact(head_dim).enumerate() {
                let at = Paged { keys: &[], values: &[], table, block_tokens, kv_heads, head_dim }.place(position as usize, head);
                expected[i][at..at + head_dim].copy_from_slice(new);
            }
        }
    }

    let load = |values: &[f32], what| Buffer::from_slice(stream, values, what);
    let device = (Buffer::from_slice(stream, &narrow(&qkv), "qkv")?, load(&frequencies, "frequencies")?);
    let [q_bias, k_bias, v_bias] = [load(&bias[0], "bias")?, load(&bias[1], "bias")?, load(&bias[2], "bias")?];
    let [q_norm, k_norm] = [load(&norms[0], "norm")?, load(&norms[1], "norm")?];
    let indices = (Buffer::from_slice(stream, &sequence, "sequence")?, Buffer::from_slice(stream, &position, "position")?);
    let table = Buffer::from_slice(stream, &table, "table")?;
    let untouched = |len: usize| Buffer::from_slice(stream, &vec![bf16::from_f32(UNTOUCHED); len], "output");
    let (q, keys, values) = (untouched(tokens * q_width)?, untouched(blocks * row)?, untouched(blocks * row)?);
    Prepare {
        qkv: device.0.view(),
        bias: model.bias.then(|| [q_bias.view(), k_bias.view(), v_bias.view()]),
        norm: [QkNorm::None, QkNorm::PerHead([q_norm.view(), k_norm.view()]), QkNorm::Full([q_norm.view(), k_norm.view()])][model.norm],
        epsilon: EPSILON,
        clip: model.clip,
        inverse_frequencies: device.1.view(),
        rope_scale,
        sequence: indices.0.view(),
        position: indices.1.view(),
        q: q.view(),
        cache: Cache { keys: keys.view(), values: values.view(), blocks, block_tokens, table: table.view(), table_stride: stride },
        heads: shape,
        tokens,
    }
    .launch(stream)?;
    for ((name, found), expected) in [("q", q), ("keys", keys), ("values", values)].into_iter().zip(expected) {
        bench.compare("attention_prepare", format!("{name} of {model:?}"), &widen(&found.to_vec()?), &expected, Tolerance::BF16);
    }
    Ok(())
}
