//! Causal attention over a paged cache, and what makes its operands.
//!
//! A step of a layer is one product (queries, keys and values of all new tokens), [`Prepare`], [`Attend`], and the product with the output's
//! weights. Both kernels take lengths and tables from the device, so a captured launch stays good while sequences grow.

mod attend;
mod prepare;

pub use self::{
    attend::{Attend, few, splits, workspace_len},
    prepare::{Prepare, QkNorm},
};
use crate::{
    Error, Result, View, bf16,
    error::{expect_aligned, expect_len},
};

/// The widest head there is a kernel for.
pub const MAX_HEAD_DIM: usize = 256;

/// Heads of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Of queries; a multiple of `kv_heads`.
    pub heads: usize,
    /// Of keys and values. Query head `h` looks at head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head: a multiple of 8, up to [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

/// Keys and values of a layer, and where those of each sequence are.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a> {
    /// `[blocks, kv_heads, block_tokens, head_dim]`.
    pub keys: View<'a, bf16>,
    /// As `keys`.
    pub values: View<'a, bf16>,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// `[sequences, table_stride]`: position `p` of sequence `s` is in block `table[s, p / block_tokens]`. Every entry for a position that is
    /// written or seen is below `blocks`; the kernels do not look.
    pub table: View<'a, u32>,
    /// Entries of each sequence.
    pub table_stride: usize,
}

impl Heads {
    /// Elements of all queries of a token.
    pub fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of the queries, keys and values of a token.
    pub fn qkv_width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn check(self, kernel: &'static str, tokens: usize) -> Result<()> {
        let Self { heads, kv_heads, head_dim } = self;
        if kv_heads == 0 || heads == 0 || heads % kv_heads != 0 || kv_heads > 65535 {
            return Err(Error::shape(kernel, format!("{heads} heads of queries do not share {kv_heads} heads of keys evenly")));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > MAX_HEAD_DIM {
            return Err(Error::shape(kernel, format!("head_dim is {head_dim}; it has to be a multiple of 8 up to {MAX_HEAD_DIM}")));
        }
        if tokens.checked_mul(heads + 2 * kv_heads).is_none_or(|rows| rows > i32::MAX as usize) {
            return Err(Error::shape(kernel, format!("{tokens} tokens of {heads} heads are more than 2^31 - 1 rows")));
        }
        Ok(())
    }
}

impl Cache<'_> {
    fn check(&self, kernel: &'static str, heads: Heads) -> Result<()> {
        let Self { keys, values, blocks, block_tokens, .. } = *self;
        if block_tokens == 0 || i32::try_from(block_tokens).is_err() {
            return Err(Error::shape(kernel, format!("block_tokens is {block_tokens}")));
        }
        // Rows are counted in 32 bits, and the last of these numbers says that there is none.
        let rows =
            blocks.checked_mul(heads.kv_heads).and_then(|rows| rows.checked_mul(block_tokens)).filter(|&rows| rows < u32::MAX as usize);
        let Some(rows) = rows else {
            let message = format!("{blocks} blocks of {block_tokens} tokens of {} heads are more than 2^32 - 2 rows", heads.kv_heads);
            return Err(Error::shape(kernel, format!("{message}: use a smaller cache")));
        };
        expect_len(kernel, "keys", keys.len(), rows * heads.head_dim)?;
        expect_len(kernel, "values", values.len(), rows * heads.head_dim)?;
        expect_aligned(kernel, "keys", keys)?;
        expect_aligned(kernel, "values", values)
    }
}
