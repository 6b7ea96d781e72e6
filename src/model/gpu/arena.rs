//! Memory of the values of a step: one block, cut into lists. Sizes and places follow from what the step is.

use hardmax_kernels::{Buffer, Element, Stream, View};

use crate::error::Result;

/// Lists begin at multiples of so many bytes.
const ALIGNMENT: usize = 256;

/// A list in an arena: so many elements from a byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place<T> {
    start: usize,
    len: usize,
    element: std::marker::PhantomData<T>,
}

/// Lays lists out, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    bytes: usize,
}

impl Cutter {
    pub(super) fn cut<T: Element>(&mut self, len: usize) -> Place<T> {
        let start = self.bytes;
        self.bytes = (start + len * size_of::<T>()).next_multiple_of(ALIGNMENT);
        Place { start, len, element: std::marker::PhantomData }
    }

    /// All that was cut.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// One block that grows to the largest step.
#[derive(Debug)]
pub(super) struct Arena {
    stream: Stream,
    block: Buffer<u8>,
}

impl Arena {
    pub(super) fn new(stream: Stream) -> Result<Self> {
        Ok(Self { stream, block: Buffer::new(stream, 0, "the values of a step")? })
    }

    /// Makes it hold `bytes`; whether it has moved.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<bool> {
        if bytes <= self.block.len() {
            return Ok(false);
        }
        // The old block goes first, so that there is never both.
        self.block = Buffer::new(self.stream, 0, "the values of a step")?;
        self.block = Buffer::new(self.stream, bytes, "the values of a step")?;
        Ok(true)
    }

    /// A list. What lies about the block is cut off, which no place of a reserved layout does.
    pub(super) fn view<T: Element>(&self, place: Place<T>) -> View<'_, T> {
        let part = self.block.view().part(place.start..place.start + place.len * size_of::<T>());
        // SAFETY: the part is inside the block, which lives as long as the view, and begins at a multiple of 256 bytes.
        unsafe { View::from_raw(part.as_mut_ptr().cast(), part.len() / size_of::<T>()) }
    }
}
