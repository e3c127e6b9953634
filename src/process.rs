//! What this process asks of the C library, of candle and of ONNX Runtime before it computes, and the cores that it has.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Makes the process ready; the first thing that `main` does.
///
/// # Safety
/// No other thread runs yet: it might read the environment or allocate while both are changed here.
pub unsafe fn prepare() {
    // SAFETY: the caller's promise.
    unsafe { keep_freed_memory() };
    // Keeps candle's element-wise operations in the thread that calls them. Its own pool of threads would wait spinning
    // for the next one, on the cores that our kernels compute on.
    // SAFETY: the caller's promise.
    unsafe { set_default("CANDLE_NUM_THREADS", "1") };
    // GroupQueryAttention in tiles ("flash") is the slower way of ONNX Runtime 1.31 on a CPU, for prompts and for single
    // tokens: benches/generate with and without it tells by how much.
    // SAFETY: as above.
    unsafe { set_default("ORT_GQA_DISABLE_FLASH_ATTENTION", "1") };
    crate::runtime::gather_pages();
}

/// Sets an environment variable, if it is not set.
///
/// # Safety
/// No other thread runs.
unsafe fn set_default(key: &str, value: &str) {
    if std::env::var_os(key).is_none() {
        // SAFETY: the caller's promise.
        unsafe { std::env::set_var(key, value) };
    }
}

/// Each keeps what was freed in it for threads of its own: more of them hold more memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MOST_ARENAS: usize = 8;

/// Tells glibc to keep large freed blocks. A training step allocates and frees the same large buffers over and
/// over; given back to the system, each is page-faulted in again, which costs as much as the arithmetic.
///
/// # Safety
/// No other thread runs.
unsafe fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the caller's promise; mallopt only sets the allocator's parameters.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        // with one for all, threads that tokenize wait for each other: two take three times as long as with two
        libc::mallopt(libc::M_ARENA_MAX, cores().min(MOST_ARENAS) as i32);
    }
}

/// Calls `handler`, in a thread of its own, with the number of every signal that asks the process to end. Where none can
/// be set, such a signal ends the process as it always does.
pub fn on_stop(mut handler: impl FnMut(i32) + Send + 'static) {
    if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        std::thread::spawn(move || signals.forever().for_each(&mut handler));
    }
}

/// The number of the signal that has asked the process to end, once one has; a second one ends it at once.
pub fn stop_signal() -> &'static AtomicI32 {
    static STOPPED: AtomicI32 = AtomicI32::new(0);
    on_stop(|signal| {
        if STOPPED.swap(signal, Ordering::Relaxed) != 0 {
            std::process::exit(exit_code(signal));
        }
    });
    &STOPPED
}

/// Lets a process that is to be started hear of signals only from this one, and be asked to end where this one is killed
/// (on Linux). It has to be started by the main thread.
pub fn lead(command: &mut Command) {
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        command.process_group(0); // a terminal's Ctrl-C reaches the group of its own
        #[cfg(target_os = "linux")]
        // SAFETY: between fork and exec, one system call that allocates nothing.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, SIGTERM) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }
    #[cfg(not(unix))]
    let _ = command;
}

/// Asks a process that was started here to end, as `kill` does; where there are no such signals, ends it.
///
/// # Errors
/// It can't be asked.
pub fn terminate(child: &mut Child) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let id = i32::try_from(child.id()).map_err(std::io::Error::other)?;
        // SAFETY: `kill` takes two numbers; the child has not been waited for, so the number is still its own.
        match unsafe { libc::kill(id, SIGTERM) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
    #[cfg(not(unix))]
    child.kill()
}

/// The exit code of a process that a signal has ended.
pub fn exit_code(signal: i32) -> i32 {
    128 + signal
}

/// The cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// This machine's name, where the system tells.
pub fn host() -> Option<String> {
    #[cfg(unix)]
    {
        let mut name = [0u8; 256];
        // SAFETY: `gethostname` writes at most as many bytes as it is told the buffer has.
        let done = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
        let name = name.split(|&byte| byte == 0).next()?;
        (done == 0).then(|| String::from_utf8_lossy(name).into_owned())
    }
    #[cfg(not(unix))]
    std::env::var("COMPUTERNAME").ok()
}

/// What the processor calls itself, where the system tells.
pub fn cpu_model() -> Option<String> {
    field(Path::new("/proc/cpuinfo"), "model name")
}

/// The most memory that this process may hold, in bytes: the machine's, or less where a control group has a limit. None
/// where the system does not tell.
pub fn memory_limit() -> Option<u64> {
    let kilobytes = field(Path::new("/proc/meminfo"), "MemTotal")?;
    let machine = kilobytes.trim_end_matches(" kB").parse::<u64>().ok()?.saturating_mul(1024);
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse::<u64>().ok());
    Some(group.map_or(machine, |group| group.min(machine)))
}

/// The memory that this process holds now, in bytes; 0 where the system does not tell.
pub fn rss_bytes() -> u64 {
    let kilobytes = field(Path::new("/proc/self/status"), "VmRSS");
    kilobytes.and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or_default() * 1024
}

/// The value of a file's first line `name: value`.
pub fn field(path: &Path, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
