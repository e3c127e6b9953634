//! Large pages for memory that is read from end to end at every step: the processor then looks addresses up less often,
//! and its prefetchers don't stop every 4 KiB.

/// Asks for large pages for the values' memory. Best before it is written for the first time. What can't be had is left
/// as it is: nothing but speed depends on it.
pub(super) fn ask_for<T>(values: &[T]) {
    let start = values.as_ptr().addr();
    advise(start, start + size_of_val(values), false);
}

/// Gathers what a library has allocated (weights that it packed for its own use) in large pages, with all else of this
/// process that is anonymous and large. What can't be had is left as it is.
pub(super) fn gather() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for line in maps.lines() {
        if let Some((start, end)) = anonymous(line) {
            advise(start, end, true);
        }
    }
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
    fn what_memory_holds_stays() {
        let values: Vec<u32> = (0..3 << 20).collect();
        ask_for(&values);
        gather();
        assert!(values.iter().enumerate().all(|(i, &value)| i == value as usize));
    }
}
