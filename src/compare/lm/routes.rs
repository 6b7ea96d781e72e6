//! Routes that are known without a router, for controls.

use super::text::Windows;

/// Expert of each token from the text alone.
pub(super) trait FixedRoute: std::fmt::Debug {
    /// `[T]`.
    fn of(&self, windows: &Windows) -> Vec<u32>;
}

/// By the byte alone.
#[derive(Debug)]
pub(super) struct ByHash {
    pub(super) experts: usize,
}

impl FixedRoute for ByHash {
    fn of(&self, windows: &Windows) -> Vec<u32> {
        let hash = |byte: u32| byte.wrapping_add(1).wrapping_mul(0x9e37_79b1) >> 16;
        windows.inputs.iter().map(|&byte| hash(byte) % self.experts as u32).collect()
    }
}

/// By the domain of the text: the optimum that routing is compared with.
#[derive(Debug)]
pub(super) struct ByDomain;

impl FixedRoute for ByDomain {
    fn of(&self, windows: &Windows) -> Vec<u32> {
        windows.domains.clone()
    }
}
