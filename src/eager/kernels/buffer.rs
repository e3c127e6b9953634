//! Numbers in memory that is kept: a training step takes and returns the same large buffers over and over, and
//! memory that is fetched from the system anew costs as much as the arithmetic on it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

/// A cache line, and the widest vector.
const ALIGNMENT: usize = 64;

/// f32 numbers that begin on a cache line. Dropped, their memory waits for the next one to ask.
pub struct Buffer {
    block: Allocation,
    length: usize,
}

impl Buffer {
    /// `length` numbers of whatever value: for one who writes each of them.
    pub fn any(length: usize) -> Self {
        Self { block: free().take(length).unwrap_or_else(|| Allocation::new(length)), length }
    }

    /// A copy.
    pub fn of(values: &[f32]) -> Self {
        let mut buffer = Self::any(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the block holds at least `length` initialised numbers, and is this buffer's alone.
        unsafe { std::slice::from_raw_parts(self.block.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.block.start.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        free().put(Allocation { ..self.block });
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Buffer({})", self.length)
    }
}

/// Memory from the allocator: `capacity` numbers, all of them initialised. It does not free itself.
struct Allocation {
    start: NonNull<f32>,
    capacity: usize,
}

// SAFETY: a block is owned by one buffer, or by the list, as a boxed slice would be.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn layout(capacity: usize) -> Layout {
        // no slice of so many numbers could exist either
        Layout::array::<f32>(capacity)
            .and_then(|layout| layout.align_to(ALIGNMENT))
            .expect("a buffer larger than the address space")
    }

    fn new(length: usize) -> Self {
        // room for a somewhat longer batch
        let capacity = length.saturating_add(length / 8).max(ALIGNMENT);
        let layout = Self::layout(capacity);
        // SAFETY: the layout is not of size zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start.cast()) else { handle_alloc_error(layout) };
        Self { start, capacity }
    }

    fn free(self) {
        // SAFETY: allocated with this layout, and nobody holds the block any more.
        unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.capacity)) }
    }
}

/// Blocks that nobody uses, by capacity.
struct Free(Vec<Allocation>);

static FREE: Mutex<Free> = Mutex::new(Free(Vec::new()));

fn free() -> MutexGuard<'static, Free> {
    // a panic between two statements of a method leaves a list that is whole
    FREE.lock().unwrap_or_else(|broken| broken.into_inner())
}

impl Free {
    /// The smallest block that fits and is not far too large. Where none does, the largest that is too small goes
    /// back to the allocator, since one that fits is about to take its place.
    fn take(&mut self, length: usize) -> Option<Allocation> {
        let at = self.0.partition_point(|block| block.capacity < length);
        if self.0.get(at).is_some_and(|block| block.capacity <= length.saturating_mul(2).saturating_add(1024))
        {
            return Some(self.0.remove(at));
        }
        if at > 0 && self.0[at - 1].capacity >= length / 2 {
            self.0.remove(at - 1).free();
        }
        None
    }

    fn put(&mut self, block: Allocation) {
        let at = self.0.partition_point(|other| other.capacity < block.capacity);
        self.0.insert(at, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_hold_what_they_say() {
        for length in [0, 1, 15, 16, 1000] {
            let (any, copy) = (Buffer::any(length), Buffer::of(&vec![3.0; length]));
            assert_eq!(any.as_ptr() as usize % ALIGNMENT, 0);
            assert_eq!(any.len(), length);
            assert!(copy.len() == length && copy.iter().all(|&x| x == 3.0));
        }
    }

    /// An eighth more than this is more than a `usize` holds, and wraps to almost nothing.
    #[test]
    #[should_panic(expected = "a buffer larger than the address space")]
    fn a_length_that_no_memory_holds_is_refused() {
        Buffer::any(usize::MAX / 9 * 8 + 64);
    }

    #[test]
    fn memory_is_used_again_and_the_list_stays_short() {
        let mut list = Free(Vec::new());
        list.put(Allocation::new(10_000));
        list.put(Allocation::new(1_000));
        assert!(list.take(10).is_none(), "a hundred times too large");
        assert!(list.take(10_000).is_some_and(|block| {
            list.put(block);
            true
        }));
        // one longer than all: the nearest makes room
        assert!(list.take(15_000).is_none());
        assert_eq!(list.0.len(), 1);
        list.0.drain(..).for_each(Allocation::free);
    }
}
