//! AMX: 16 x 16 tiles of f32 sums of bf16 products.
//!
//! `std::arch` has no stable tile intrinsics, so that the loops are assembly. Weights are the left operand: a tile of 16 weight
//! rows by 32 elements is loaded from row-major weights as they are. The right operand is 16 tokens in the order that the
//! instruction wants, `[k / 2][16][2]`, which [`super::pack`] makes. A sum runs over k in order, 2 elements at a time, whatever
//! else is in the tile.

use std::arch::asm;

/// Elements of k in one tile.
pub(crate) const DEPTH: usize = 32;

/// Asks the system for the tile registers, for the whole process. `false` if the CPU or the system has none.
pub(crate) fn enable() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    #[target_feature(enable = "xsave")]
    fn saved_state() -> u64 {
        // SAFETY: the caller has seen OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    const OSXSAVE: u32 = 1 << 27;
    /// AMX-BF16 and AMX-TILE.
    const AMX: u32 = 1 << 22 | 1 << 24;
    /// Tile configuration and tile data.
    const XCR0: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & AMX != AMX {
        return false;
    }
    // SAFETY: OSXSAVE says that XGETBV may be used.
    if unsafe { saved_state() } & XCR0 != XCR0 {
        return false;
    }
    permitted()
}

/// Linux gives the tile registers to processes that ask for them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    // SAFETY: a system call that takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// All eight tile registers at their full size, for as long as this lives. One per thread and task.
pub(crate) struct Tiles(());

#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`enable`] has returned `true`; this thread holds no other [`Tiles`].
    pub(crate) unsafe fn configure() -> Self {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: the CPU has AMX; the instruction reads the 64 bytes of `config`.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles were configured on this thread.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// 16 weight rows: the address of the first, and the bytes from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    pub(crate) start: *const u8,
    pub(crate) stride: usize,
    /// What will be needed next, as many bytes as these rows have: asked for ahead of time. Need not be readable.
    pub(crate) next: *const u8,
}

/// Sixteen lines of `next`: as much as one tile holds.
macro_rules! ask {
    ($p:literal) => {
        concat!(
            "prefetcht0 [{",
            $p,
            "}]\n",
            "prefetcht0 [{",
            $p,
            "} + 64]\n",
            "prefetcht0 [{",
            $p,
            "} + 128]\n",
            "prefetcht0 [{",
            $p,
            "} + 192]\n",
            "prefetcht0 [{",
            $p,
            "} + 256]\n",
            "prefetcht0 [{",
            $p,
            "} + 320]\n",
            "prefetcht0 [{",
            $p,
            "} + 384]\n",
            "prefetcht0 [{",
            $p,
            "} + 448]\n",
            "prefetcht0 [{",
            $p,
            "} + 512]\n",
            "prefetcht0 [{",
            $p,
            "} + 576]\n",
            "prefetcht0 [{",
            $p,
            "} + 640]\n",
            "prefetcht0 [{",
            $p,
            "} + 704]\n",
            "prefetcht0 [{",
            $p,
            "} + 768]\n",
            "prefetcht0 [{",
            $p,
            "} + 832]\n",
            "prefetcht0 [{",
            $p,
            "} + 896]\n",
            "prefetcht0 [{",
            $p,
            "} + 960]\n",
            "add {",
            $p,
            "}, 1024",
        )
    };
}

/// A loop over two tiles of rows by two of tokens: what the sums start from, and what is asked for on the way.
macro_rules! two_by_two {
    ($left:ident, $right:ident, $steps:ident, $out:ident, [$($begin:expr),*], [$($ask0:expr, $ask1:expr)?], [$($operands:tt)*]) => {
        asm!(
            $($begin,)*
            "2:",
            "tileloadd tmm4, [{a0} + {stride}]",
            "tileloadd tmm6, [{b0} + {line}]",
            $($ask0,)?
            "tileloadd tmm7, [{b1} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {stride}]",
            $($ask1,)?
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64", "add {a1}, 64", "add {b0}, 1024", "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {line}], tmm0",
            "add {out}, 1024",
            "tilestored [{out} + {line}], tmm1",
            "add {out}, 1024",
            "tilestored [{out} + {line}], tmm2",
            "add {out}, 1024",
            "tilestored [{out} + {line}], tmm3",
            a0 = inout(reg) $left[0].start => _, a1 = inout(reg) $left[1].start => _, stride = in(reg) $left[0].stride,
            b0 = inout(reg) $right[0] => _, b1 = inout(reg) $right[1] => _, line = in(reg) 64usize,
            steps = inout(reg) $steps => _, out = inout(reg) $out => _,
            $($operands)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// Two times 16 weight rows by two blocks of 16 tokens. `out[(2 a + b) · 256 ..]` is `[16 weight rows][16 tokens]`.
///
/// # Safety
/// Tiles are configured; both sides are readable for `steps` tiles; `out` is writable for 1024 elements.
#[inline(always)]
pub(crate) unsafe fn two_by_two(left: [Left; 2], right: [*const u8; 2], steps: usize, out: *mut f32) {
    debug_assert!(steps > 0);
    // SAFETY: the caller's contract.
    unsafe {
        two_by_two!(left, right, steps, out, ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"], [], []);
    }
}

/// [`two_by_two`] that asks for the next weights: for the first tokens, when weights come from memory.
///
/// # Safety
/// As [`two_by_two`].
#[inline(always)]
pub(crate) unsafe fn two_by_two_ahead(left: [Left; 2], right: [*const u8; 2], steps: usize, out: *mut f32) {
    debug_assert!(steps > 0);
    // SAFETY: the caller's contract; prefetching cannot fault.
    unsafe {
        two_by_two!(
            left, right, steps, out,
            ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            [ask!("p0"), ask!("p1")],
            [p0 = inout(reg) left[0].next => _, p1 = inout(reg) left[1].next => _,]
        );
    }
}

/// [`two_by_two`] added to what `out` holds.
///
/// # Safety
/// As [`two_by_two`]; `out` is readable.
#[inline(always)]
pub(crate) unsafe fn two_by_two_onto(left: [Left; 2], right: [*const u8; 2], steps: usize, out: *mut f32) {
    debug_assert!(steps > 0);
    // SAFETY: the caller's contract.
    unsafe {
        two_by_two!(
            left, right, steps, out,
            [
                "tileloadd tmm0, [{out} + {line}]",
                "tileloadd tmm1, [{out1} + {line}]",
                "tileloadd tmm2, [{out2} + {line}]",
                "tileloadd tmm3, [{out3} + {line}]"
            ],
            [],
            [out1 = in(reg) out.add(256), out2 = in(reg) out.add(512), out3 = in(reg) out.add(768),]
        );
    }
}

/// Two times 16 weight rows by one block of 16 tokens. `out[a · 256 ..]` is `[16 weight rows][16 tokens]`. Asks for the next weights.
///
/// # Safety
/// As [`two_by_two`]; `out` is writable for 512 elements.
#[inline(always)]
pub(crate) unsafe fn two_by_one(left: [Left; 2], right: *const u8, steps: usize, out: *mut f32) {
    debug_assert!(steps > 0);
    // SAFETY: the caller's contract; prefetching cannot fault.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1",
            "2:",
            "tileloadd tmm6, [{b} + {line}]",
            "tileloadd tmm4, [{a0} + {stride}]",
            ask!("p0"),
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {stride}]",
            ask!("p1"),
            "tdpbf16ps tmm1, tmm5, tmm6",
            "add {a0}, 64", "add {a1}, 64", "add {b}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {line}], tmm0",
            "add {out}, 1024",
            "tilestored [{out} + {line}], tmm1",
            a0 = inout(reg) left[0].start => _, a1 = inout(reg) left[1].start => _, stride = in(reg) left[0].stride,
            p0 = inout(reg) left[0].next => _, p1 = inout(reg) left[1].next => _,
            b = inout(reg) right => _, line = in(reg) 64usize,
            steps = inout(reg) steps => _, out = inout(reg) out => _,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack)
        );
    }
}
