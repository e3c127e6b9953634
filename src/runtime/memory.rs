//! Memory that runs read and write in place: this process's own, or what ONNX Runtime allocates for a provider, whose
//! bytes we never touch ourselves.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::Context;
use ort::AsPointer;
use ort::sys;

use super::binding::{Place, check};
use super::session::OrtSession;
use crate::Result;

/// Bytes that bindings point into. All pointers to them come from the allocation's own, so that a look at them in
/// between takes no binding's right away.
pub(super) struct PinnedBytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owned as a boxed slice would be; whoever holds pointers into it is kept together with it.
unsafe impl Send for PinnedBytes {}

impl PinnedBytes {
    /// So many bytes, all zero, where numbers of any type may stand.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn zeros(length: usize) -> Result<Self> {
        let layout = Layout::from_size_align(length, align_of::<u64>()).context("too many bytes")?;
        if length == 0 {
            return Ok(Self { start: NonNull::<u64>::dangling().cast(), layout });
        }
        // SAFETY: the layout is not empty
        let start = NonNull::new(unsafe { alloc_zeroed(layout) });
        Ok(Self { start: start.with_context(|| format!("no memory for {length} bytes"))?, layout })
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: so many initialised bytes, and a run, which alone writes others', borrows their owner mutably.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for PinnedBytes {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: from `alloc_zeroed` of this layout, and freed once.
            unsafe { dealloc(self.start.as_ptr(), self.layout) }
        }
    }
}

/// What gives out a provider's memory.
pub(super) struct Allocator {
    allocator: NonNull<sys::OrtAllocator>,
    pub place: Place,
}

// SAFETY: ONNX Runtime ties an allocator to no thread.
unsafe impl Send for Allocator {}
// SAFETY: a session's own runs allocate from it in several threads at once; it has a lock.
unsafe impl Sync for Allocator {}

impl Allocator {
    /// The one of a session, which has to outlive all that is allocated.
    ///
    /// # Errors
    /// The session computes nothing in this place.
    pub fn of(session: &OrtSession, place: Place) -> Result<Self> {
        let mut allocator = std::ptr::null_mut();
        // SAFETY: both are alive; a status is looked at before the result
        check(unsafe { (ort::api().CreateAllocator)(session.session.ptr(), place.ptr(), &mut allocator) })?;
        Ok(Self { allocator: NonNull::new(allocator).context("ONNX Runtime gave no allocator")?, place })
    }

    /// So many bytes, which may hold anything.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn allocate(self: &Arc<Self>, length: usize) -> Result<Block> {
        let mut start = std::ptr::null_mut();
        if length > 0 {
            // SAFETY: the allocator is alive; a status is looked at before the result
            check(unsafe { (ort::api().AllocatorAlloc)(self.allocator.as_ptr(), length, &mut start) })?;
            anyhow::ensure!(!start.is_null(), "no memory for {length} bytes");
        }
        let start = NonNull::new(start.cast()).unwrap_or(NonNull::<u64>::dangling().cast());
        Ok(Block { start, length, allocator: self.clone() })
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        // SAFETY: made by CreateAllocator, and released once
        unsafe { (ort::api().ReleaseAllocator)(self.allocator.as_ptr()) }
    }
}

/// Bytes of a provider's memory.
pub(super) struct Block {
    start: NonNull<u8>,
    length: usize,
    allocator: Arc<Allocator>,
}

// SAFETY: owned as a boxed slice would be.
unsafe impl Send for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: from `allocate` of this allocator, and freed once. What could be done about an error?
            drop(check(unsafe {
                (ort::api().AllocatorFree)(self.allocator.allocator.as_ptr(), self.start.as_ptr().cast())
            }));
        }
    }
}

/// Bytes in either.
pub(super) enum Bytes {
    Own(PinnedBytes),
    Providers(Block),
}

impl Bytes {
    /// None.
    pub fn none() -> Result<Self> {
        Ok(Self::Own(PinnedBytes::zeros(0)?))
    }

    /// The place of a range of them.
    pub fn part(&mut self, range: Range<usize>) -> NonNull<[u8]> {
        let (start, length) = match self {
            Self::Own(bytes) => (bytes.start, bytes.layout.size()),
            Self::Providers(block) => (block.start, block.length),
        };
        assert!(range.start <= range.end && range.end <= length);
        // SAFETY: inside the allocation, by the assertion.
        NonNull::slice_from_raw_parts(unsafe { start.add(range.start) }, range.len())
    }

    /// The place of all of them.
    pub fn whole(&mut self) -> NonNull<[u8]> {
        let length = match self {
            Self::Own(bytes) => bytes.layout.size(),
            Self::Providers(block) => block.length,
        };
        self.part(0..length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a run does that reads and writes through a binding, before and after we look at the numbers ourselves.
    #[test]
    fn pointers_into_the_bytes_outlive_our_own_looks_at_them() {
        let mut bytes = Bytes::Own(PinnedBytes::zeros(6).unwrap());
        let (first, second) = (bytes.part(0..4), bytes.part(2..6));
        let Bytes::Own(own) = &mut bytes else { unreachable!() };
        // SAFETY: both lie inside of the bytes, which are alive, and nobody else writes them.
        unsafe { first.cast::<u8>().add(3).write(3) };
        own.as_mut_slice()[0] = 1;
        // SAFETY: as above.
        unsafe { second.cast::<u8>().add(3).write(5) };
        assert_eq!(own.as_slice(), [1, 0, 0, 3, 0, 5]);
        // SAFETY: as above.
        assert_eq!(unsafe { first.cast::<u8>().read() }, 1);
        assert!(PinnedBytes::zeros(0).unwrap().as_slice().is_empty());
    }

    #[test]
    fn what_no_memory_holds_is_an_error() {
        assert!(PinnedBytes::zeros(usize::MAX).is_err());
    }

    #[test]
    #[should_panic]
    fn a_part_behind_the_bytes_is_refused() {
        Bytes::Own(PinnedBytes::zeros(6).unwrap()).part(4..7);
    }
}
