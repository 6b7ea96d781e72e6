//! Memory of the device.

use std::{
    ffi::c_void,
    marker::PhantomData,
    ops::{Bound, RangeBounds},
    ptr, slice,
};

use half::bf16;

use crate::{
    Error, Result, Stream,
    device::memory,
    error::{check, expect_len},
    routing::TokenPolicy,
    sample::Choice,
};

unsafe extern "C" {
    fn hm_alloc(at: *mut *mut c_void, bytes: i64, stream: *mut c_void) -> i32;
    fn hm_free(at: *mut c_void, stream: *mut c_void) -> i32;
    fn hm_alloc_host(at: *mut *mut c_void, bytes: i64) -> i32;
    fn hm_free_host(at: *mut c_void) -> i32;
    fn hm_copy(to: *mut c_void, from: *const c_void, bytes: i64, stream: *mut c_void) -> i32;
    fn hm_fill(at: *mut c_void, byte: i32, bytes: i64, stream: *mut c_void) -> i32;
}

mod sealed {
    pub trait Sealed {}
}

/// What device memory is made of: any bits are a value.
pub trait Element: sealed::Sealed + Copy + Send + Sync + std::fmt::Debug + 'static {}

macro_rules! elements {
    ($($element:ty),*) => { $(impl sealed::Sealed for $element {} impl Element for $element {})* };
}
elements!(u8, u16, u32, i32, u64, i64, f32, bf16, Choice, TokenPolicy);

/// The bits of an element, as words.
pub fn words<T: Element, const WORDS: usize>(element: T) -> [u32; WORDS] {
    const { assert!(size_of::<T>() == 4 * WORDS, "an element of as many words") };
    // SAFETY: both have as many bytes, and elements have no gaps.
    unsafe { std::mem::transmute_copy(&element) }
}

/// Device memory, from the pool of a stream and back to it: reuse is in the order of the stream.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    at: *mut T,
    len: usize,
    stream: Stream,
}

// SAFETY: memory of a device has no tie to a thread.
unsafe impl<T: Element> Send for Buffer<T> {}
// SAFETY: what is done to it is done by the stream, in order.
unsafe impl<T: Element> Sync for Buffer<T> {}

impl<T: Element> Buffer<T> {
    /// Memory for `len` elements, which hold anything. `what` it is for is told where there is none.
    pub fn new(stream: Stream, len: usize, what: &'static str) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| i64::try_from(bytes).ok());
        let too_large = |bytes: u64| {
            let (free, total) = memory().unwrap_or_default();
            Error::OutOfMemory { what, bytes, free, total }
        };
        let Some(bytes) = bytes else { return Err(too_large(u64::MAX)) };
        let mut at = ptr::null_mut();
        // SAFETY: `at` is written; the stream lives. No size is asked for that CUDA would answer with null.
        match unsafe { hm_alloc(&mut at, bytes.max(1), stream.raw()) } {
            0 => Ok(Self { at: at.cast(), len, stream }),
            2 => Err(too_large(bytes as u64)),
            code => Err(check("allocating memory", code).err().unwrap_or_else(|| too_large(bytes as u64))),
        }
    }

    /// Elements of bits 0.
    pub fn zeros(stream: Stream, len: usize, what: &'static str) -> Result<Self> {
        let buffer = Self::new(stream, len, what)?;
        buffer.view().fill(0, stream)?;
        Ok(buffer)
    }

    /// A copy of `values`. Waits for it.
    pub fn from_slice(stream: Stream, values: &[T], what: &'static str) -> Result<Self> {
        let buffer = Self::new(stream, values.len(), what)?;
        buffer.view().write(values, stream)?;
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn view(&self) -> View<'_, T> {
        View { at: self.at, len: self.len, buffer: PhantomData }
    }

    /// A copy on the host. Waits for everything before it.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        self.view().to_vec(self.stream)
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: it is dropped once; the stream outlives it. What was launched before still finds it.
        unsafe { hm_free(self.at.cast(), self.stream.raw()) };
    }
}

/// Some of a device's memory, for reading and for writing: who does what when is said by the order of the stream.
#[derive(Debug)]
pub struct View<'a, T: Element> {
    at: *mut T,
    len: usize,
    buffer: PhantomData<&'a T>,
}

impl<T: Element> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element> Copy for View<'_, T> {}

// SAFETY: as of `Buffer`.
unsafe impl<T: Element> Send for View<'_, T> {}
// SAFETY: as of `Buffer`.
unsafe impl<T: Element> Sync for View<'_, T> {}

impl<'a, T: Element> View<'a, T> {
    /// Memory that somebody else owns.
    ///
    /// # Safety
    /// There are `len` elements at `at`, in memory of the device, for as long as the view lives and what is launched with it runs; what kernels write to, nobody
    /// believes constant.
    pub unsafe fn from_raw(at: *mut T, len: usize) -> Self {
        Self { at, len, buffer: PhantomData }
    }

    /// The address.
    pub fn as_ptr(self) -> *const T {
        self.at
    }

    /// The address.
    pub fn as_mut_ptr(self) -> *mut T {
        self.at
    }

    /// Elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part. What lies about it is cut off.
    pub fn part(self, range: impl RangeBounds<usize>) -> Self {
        let from = match range.start_bound() {
            Bound::Included(&from) => from,
            Bound::Excluded(&from) => from.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(&to) => to.saturating_add(1),
            Bound::Excluded(&to) => to,
            Bound::Unbounded => self.len,
        };
        let (from, to) = (from.min(self.len), to.min(self.len));
        // SAFETY: `from` is not behind the end.
        Self { at: unsafe { self.at.add(from) }, len: to.saturating_sub(from), buffer: PhantomData }
    }

    /// The same bytes as other elements. A rest that makes none is cut off.
    ///
    /// # Errors
    /// `Shape` where the address is not one of such an element.
    pub fn cast<U: Element>(self) -> Result<View<'a, U>> {
        if !self.at.addr().is_multiple_of(align_of::<U>()) {
            return Err(Error::shape(
                "cast",
                format!("an address of {} bytes cannot hold elements of {}", align_of::<T>(), align_of::<U>()),
            ));
        }
        Ok(View { at: self.at.cast(), len: self.len * size_of::<T>() / size_of::<U>(), buffer: PhantomData })
    }

    /// Sets every byte.
    pub fn fill(self, byte: u8, stream: Stream) -> Result<()> {
        // SAFETY: the bytes are those of the view.
        check("filling memory", unsafe { hm_fill(self.at.cast(), byte.into(), self.bytes(self.len), stream.raw()) })
    }

    /// Copies `values` to the beginning. They may be given up at once only if they lie in pageable memory; [`HostBuffer`] says how it is with others.
    pub fn write(self, values: &[T], stream: Stream) -> Result<()> {
        expect_len("copy", "the target", self.len, values.len())?;
        // SAFETY: there are as many elements on both sides; from pageable memory CUDA has taken the bytes when it returns.
        check("copying to the device", unsafe { hm_copy(self.at.cast(), values.as_ptr().cast(), self.bytes(values.len()), stream.raw()) })
    }

    /// Copies the beginning of another view, as much as this one holds.
    pub fn copy_from(self, other: View<'_, T>, stream: Stream) -> Result<()> {
        expect_len("copy", "the source", other.len, self.len)?;
        // SAFETY: there are as many elements on both sides.
        check("copying on the device", unsafe { hm_copy(self.at.cast(), other.at.cast(), self.bytes(self.len), stream.raw()) })
    }

    /// Copies it to the beginning of `to`, some time: `to` holds it once the stream was waited for.
    pub fn read_into(self, to: &mut HostBuffer<T>, stream: Stream) -> Result<()> {
        expect_len("copy", "the target", to.len, self.len)?;
        // SAFETY: there are as many elements on both sides; the buffer says that it is not read before.
        check("copying to the host", unsafe { hm_copy(to.at.cast(), self.at.cast(), self.bytes(self.len), stream.raw()) })
    }

    /// A copy on the host. Waits for everything before it.
    pub fn to_vec(self, stream: Stream) -> Result<Vec<T>> {
        let mut values: Vec<T> = Vec::with_capacity(self.len);
        // SAFETY: there is room for as many elements.
        check("copying to the host", unsafe { hm_copy(values.as_mut_ptr().cast(), self.at.cast(), self.bytes(self.len), stream.raw()) })?;
        stream.synchronize()?;
        // SAFETY: all of them were written, and any bits are a value.
        unsafe { values.set_len(self.len) };
        Ok(values)
    }

    fn bytes(self, len: usize) -> i64 {
        (len * size_of::<T>()) as i64
    }
}

/// Memory of the host that copies run to and from without the host's help. Its owner sees to it that nobody reads or writes it while a copy runs.
#[derive(Debug)]
pub struct HostBuffer<T: Element> {
    at: *mut T,
    len: usize,
}

// SAFETY: it is memory.
unsafe impl<T: Element> Send for HostBuffer<T> {}

impl<T: Element> HostBuffer<T> {
    /// `len` elements of bits 0.
    pub fn new(len: usize) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>()).max(1);
        let mut at = ptr::null_mut();
        let size = i64::try_from(bytes).unwrap_or(i64::MAX);
        // SAFETY: `at` is written, and that is all.
        check("allocating pinned memory of the host", unsafe { hm_alloc_host(&mut at, size) })?;
        // SAFETY: there are as many bytes.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Self { at: at.cast(), len })
    }

    /// What it holds.
    pub fn values(&self) -> &[T] {
        // SAFETY: there are `len` elements, all of them written.
        unsafe { slice::from_raw_parts(self.at, self.len) }
    }

    /// To be written.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: there are `len` elements, all of them written, and nobody else has them.
        unsafe { slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T: Element> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: it is dropped once.
        unsafe { hm_free_host(self.at.cast()) };
    }
}
