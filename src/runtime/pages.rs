//! Large pages for memory that is read from end to end at every step: the processor then looks addresses up less often,
//! and its prefetchers don't stop every 4 KiB.

use std::sync::atomic::{AtomicBool, Ordering};

/// Asks for large pages for the values' memory. Best before it is written for the first time. What can't be had is left
/// as it is: nothing but speed depends on it.
pub(super) fn ask_for<T>(values: &[T]) {
    let start = values.as_ptr().addr();
    advise(start, start + size_of_val(values), false);
}

/// Whether this process wants all its memory gathered.
static GATHERS: AtomicBool = AtomicBool::new(false);

/// From now on, what ONNX Runtime allocates while it loads a graph that generates (weights that it packs for its own
/// use) is gathered in large pages, and with it all else of this process that is anonymous and large. That is for
/// whoever owns the process to say: `main` does, a library must not.
pub fn gather_pages() {
    GATHERS.store(true, Ordering::Relaxed);
}

/// Gathers the process's memory, if [`gather_pages`] has asked for it. What can't be had is left as it is.
pub(super) fn gather() {
    if !GATHERS.load(Ordering::Relaxed) {
        return;
    }
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, end) in heaps(&maps) {
        advise(start, end, true);
    }
}

/// Where private memory lies that is neither a file's nor a stack's, of the lines of `/proc/self/maps`.
fn heaps(maps: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = maps.lines().collect();
    // the stack of a thread is known by the page below it, which nobody may touch
    let guarded = |start: usize| {
        lines.iter().any(|line| {
            let mut fields = line.split_ascii_whitespace();
            let end =
                fields.next().and_then(|range| usize::from_str_radix(range.split_once('-')?.1, 16).ok());
            end == Some(start) && fields.next().is_some_and(|rights| rights.starts_with("---"))
        })
    };
    lines.iter().filter_map(|line| anonymous(line)).filter(|&(start, _)| !guarded(start)).collect()
}

/// Where private memory that is no file's lies, of a line of `/proc/self/maps`.
fn anonymous(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights) = (fields.next()?, fields.next()?);
    let (inode, name) = (fields.nth(2)?, fields.next().unwrap_or("[heap]"));
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    (rights == "rw-p" && inode == "0" && name == "[heap]").then_some((address(start)?, address(end)?))
}

/// Large pages for what lies between two addresses, for the whole ones alone; at once, where it was written before.
#[cfg(target_os = "linux")]
fn advise(start: usize, end: usize, at_once: bool) {
    /// Of x86-64, and of AArch64 with pages of 4 KiB.
    const LARGE: usize = 2 << 20;
    let (start, end) = (start.next_multiple_of(LARGE), end / LARGE * LARGE);
    if start >= end {
        return;
    }
    let place = std::ptr::without_provenance_mut(start);
    // SAFETY: neither call changes what the memory holds or whether it may be used, wherever it lies
    unsafe {
        libc::madvise(place, end - start, libc::MADV_HUGEPAGE);
        if at_once {
            libc::madvise(place, end - start, libc::MADV_COLLAPSE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: usize, _: usize, _: bool) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_files_and_of_stacks_is_left_alone() {
        let found = |line| anonymous(line);
        assert_eq!(found("7f00-7fff rw-p 00000000 00:00 0 "), Some((0x7f00, 0x7fff)));
        assert_eq!(found("10-20 rw-p 00000000 00:00 0    [heap]"), Some((0x10, 0x20)));
        for other in
            ["10-20 rw-p 00000000 00:00 0 [stack]", "10-20 r--p 0 00:00 0", "10-20 rw-p 0 08:01 77 /x", ""]
        {
            assert_eq!(found(other), None, "{other}");
        }
    }

    #[test]
    fn stacks_of_threads_are_left_alone() {
        let maps = "10-20 rw-p 00000000 00:00 0 [heap]\n\
                    1000-2000 ---p 00000000 00:00 0\n\
                    2000-9000 rw-p 00000000 00:00 0\n\
                    a000-b000 r--p 00000000 08:01 77 /x\n\
                    b000-f000 rw-p 00000000 00:00 0\n";
        assert_eq!(heaps(maps), [(0x10, 0x20), (0xb000, 0xf000)]);
    }

    /// The pages of a stack that lie below what it uses are not there, and must not come by gathering.
    #[test]
    #[cfg(target_os = "linux")]
    fn this_threads_stack_is_no_heap() {
        let here = std::thread::spawn(|| {
            let local = 0u8;
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let place = std::ptr::from_ref(&local).addr();
            heaps(&maps).into_iter().find(|(start, end)| (start..end).contains(&&place))
        });
        assert_eq!(here.join().unwrap(), None);
    }

    #[test]
    fn memory_is_gathered_only_where_it_was_asked_for() {
        let values: Vec<u32> = (0..3 << 20).collect();
        assert!(!GATHERS.load(Ordering::Relaxed), "nothing but `main` asks");
        ask_for(&values);
        gather();
        gather_pages();
        gather();
        assert!(values.iter().enumerate().all(|(i, &value)| i == value as usize));
    }
}
