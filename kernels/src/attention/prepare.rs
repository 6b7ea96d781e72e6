use std::{ffi::c_void, ptr};

use super::{Cache, Heads};
use crate::{
    Error, Result, Stream, View, bf16,
    error::{check, expect_aligned, expect_len, int},
};

#[repr(C)]
struct Args {
    qkv: *const bf16,
    q_bias: *const f32,
    k_bias: *const f32,
    v_bias: *const f32,
    q_norm: *const f32,
    k_norm: *const f32,
    inverse_frequencies: *const f32,
    sequence: *const u32,
    position: *const u32,
    table: *const u32,
    q: *mut bf16,
    keys: *mut bf16,
    values: *mut bf16,
    epsilon: f32,
    clip: f32,
    rope_scale: f32,
    tokens: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    block_tokens: i32,
    table_stride: i32,
    norm_full: i32,
}

unsafe extern "C" {
    fn hm_attention_prepare(args: *const Args, stream: *mut c_void) -> i32;
}

/// RMSNorm of queries and keys, before they are rotated. Weights of queries, then of keys.
#[derive(Clone, Copy, Debug)]
pub enum QkNorm<'a> {
    /// There is none.
    None,
    /// Over each head: both `[head_dim]`.
    PerHead([View<'a, f32>; 2]),
    /// Over all heads of a token: `[heads * head_dim]` and `[kv_heads * head_dim]`.
    Full([View<'a, f32>; 2]),
}

/// From the product of a layer to queries and cached keys and values: bias, norm, clip and rotary embedding in f32, rounded to bf16 once.
///
/// The product is bf16: it is read once, and half the bytes of it cost one rounding that the checkpoint's own implementation makes as well.
/// A token does not depend on others.
#[derive(Clone, Copy, Debug)]
pub struct Prepare<'a> {
    /// `[tokens, (heads + 2 kv_heads) * head_dim]`: queries of all heads, then keys, then values.
    pub qkv: View<'a, bf16>,
    /// `[heads * head_dim]`, `[kv_heads * head_dim]` twice.
    pub bias: Option<[View<'a, f32>; 3]>,
    /// Of queries and keys.
    pub norm: QkNorm<'a>,
    /// Of the norm.
    pub epsilon: f32,
    /// Largest size of a query, key or value, after the norm.
    pub clip: Option<f32>,
    /// `[head_dim / 2]`: elements `i` and `i + head_dim / 2` rotate by `position * inverse_frequencies[i]`.
    pub inverse_frequencies: View<'a, f32>,
    /// Of the rotated.
    pub rope_scale: f32,
    /// `[tokens]`: row of the table; `u32::MAX` for a token that is none: nothing of it is written.
    pub sequence: View<'a, u32>,
    /// `[tokens]`: within the sequence.
    pub position: View<'a, u32>,
    /// `[tokens, heads, head_dim]`.
    pub q: View<'a, bf16>,
    /// Where keys and values go.
    pub cache: Cache<'a>,
    /// Of the layer.
    pub heads: Heads,
    /// Tokens, with those that are none.
    pub tokens: usize,
}

const KERNEL: &str = "attention_prepare";

impl Prepare<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        let Self { qkv, inverse_frequencies, sequence, position, q, cache, heads, tokens, .. } = self;
        if tokens == 0 {
            return Ok(());
        }
        heads.check(KERNEL, tokens)?;
        cache.check(KERNEL, heads)?;
        expect_len(KERNEL, "qkv", qkv.len(), tokens * heads.qkv_width())?;
        expect_len(KERNEL, "q", q.len(), tokens * heads.width())?;
        expect_len(KERNEL, "inverse_frequencies", inverse_frequencies.len(), heads.head_dim / 2)?;
        expect_len(KERNEL, "sequence", sequence.len(), tokens)?;
        expect_len(KERNEL, "position", position.len(), tokens)?;
        expect_aligned(KERNEL, "qkv", qkv)?;
        expect_aligned(KERNEL, "q", q)?;
        let clip = self.clip.unwrap_or(f32::INFINITY);
        if clip.is_nan() || clip < 0.0 {
            return Err(Error::shape(KERNEL, format!("clip is {clip}")));
        }
        let [q_bias, k_bias, v_bias] = self.biases()?;
        let ([q_norm, k_norm], norm_full) = self.norms()?;
        let args = Args {
            qkv: qkv.as_ptr(),
            q_bias,
            k_bias,
            v_bias,
            q_norm,
            k_norm,
            inverse_frequencies: inverse_frequencies.as_ptr(),
            sequence: sequence.as_ptr(),
            position: position.as_ptr(),
            table: cache.table.as_ptr(),
            q: q.as_mut_ptr(),
            keys: cache.keys.as_mut_ptr(),
            values: cache.values.as_mut_ptr(),
            epsilon: self.epsilon,
            clip,
            rope_scale: self.rope_scale,
            tokens: int(KERNEL, "tokens", tokens)?,
            heads: int(KERNEL, "heads", heads.heads)?,
            kv_heads: int(KERNEL, "kv_heads", heads.kv_heads)?,
            head_dim: int(KERNEL, "head_dim", heads.head_dim)?,
            block_tokens: int(KERNEL, "block_tokens", cache.block_tokens)?,
            table_stride: int(KERNEL, "table_stride", cache.table_stride)?,
            norm_full: norm_full.into(),
        };
        // SAFETY: the views are as long as the shapes say; that the table holds blocks of the cache is what its doc asks for.
        check(KERNEL, unsafe { hm_attention_prepare(&args, stream.raw()) })
    }

    fn biases(&self) -> Result<[*const f32; 3]> {
        let Some(biases) = self.bias else { return Ok([ptr::null(); 3]) };
        let (q_width, kv_width) = (self.heads.width(), self.heads.kv_heads * self.heads.head_dim);
        for (name, bias, len) in [("q_bias", biases[0], q_width), ("k_bias", biases[1], kv_width), ("v_bias", biases[2], kv_width)] {
            expect_len(KERNEL, name, bias.len(), len)?;
        }
        Ok(biases.map(View::as_ptr))
    }

    /// Weights, and whether they are for all heads at once.
    fn norms(&self) -> Result<([*const f32; 2], bool)> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let ([q, k], times, full) = match self.norm {
            QkNorm::None => return Ok(([ptr::null(); 2], false)),
            QkNorm::PerHead(norms) => (norms, [1, 1], false),
            QkNorm::Full(norms) => (norms, [heads, kv_heads], true),
        };
        expect_len(KERNEL, "q_norm", q.len(), times[0] * head_dim)?;
        expect_len(KERNEL, "k_norm", k.len(), times[1] * head_dim)?;
        Ok(([q.as_ptr(), k.as_ptr()], full))
    }
}
