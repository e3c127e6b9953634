//! Where ONNX Runtime's shared library lies → the process's one environment.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ort::environment::Environment;
use ort::logging::{LogLevel, LoggerFunction};
use serde_json::{Map, Value};

use crate::say::{Level, Say};
use crate::{Result, unusable};

/// The oldest ONNX Runtime that is taken, 1.x: it can tell which provider runs which node.
pub const OLDEST_MINOR: u32 = ort::MINOR_VERSION;

/// The environment variable that names the library and wins over the search.
const VARIABLE: &str = "ORT_DYLIB_PATH";

const REMEDY: &str = "run ./scripts/setup, or set ORT_DYLIB_PATH to the library's path";

/// The loaded library.
#[derive(Clone, Debug)]
pub struct Library {
    pub path: PathBuf,
    /// The version's second number: 31 of 1.31.
    pub minor: u32,
    /// What led to it.
    pub found: &'static str,
}

/// Whether the build with OpenVINO is looked for first: a process loads one library.
static OPENVINO_FIRST: AtomicBool = AtomicBool::new(false);

/// Lets the search prefer the build with OpenVINO; says nothing to a library that is loaded already.
pub fn prefer_openvino() {
    OPENVINO_FIRST.store(true, Ordering::Relaxed);
}

/// One place to take the library from.
struct Place {
    path: PathBuf,
    found: &'static str,
}

struct Loaded {
    library: Library,
    environment: Environment,
}

/// The library that this process uses; loads it on first use.
///
/// # Errors
/// Unusable: no library where it was looked for, one that can't be loaded, or one that is too old.
pub fn library() -> Result<&'static Library> {
    loaded().map(|loaded| &loaded.library)
}

/// ONNX Runtime allows one environment a process, so it lives as long as the process.
pub(super) fn environment() -> Result<&'static Environment> {
    loaded().map(|loaded| &loaded.environment)
}

/// What the library says of its own build: branch, commit, compiler flags.
pub fn build_info() -> Result<&'static str> {
    loaded().map(|_| ort::info())
}

fn loaded() -> Result<&'static Loaded> {
    static LOADED: OnceLock<Result<Loaded, String>> = OnceLock::new();
    LOADED
        .get_or_init(|| load().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|text| unusable!("{text}"))
}

fn load() -> Result<Loaded> {
    let place = find()?;
    let shown = place.path.display();
    let builder = match ort::init_from(&place.path) {
        Ok(builder) => builder,
        Err(ort::LoadDynamicError::BadVersion { version_str, .. }) => {
            return Err(unusable!(
                "{shown} ({}) is ONNX Runtime {version_str}; tk needs 1.{OLDEST_MINOR} or newer: {REMEDY}",
                place.found
            ));
        }
        Err(error) => {
            let why = match &error {
                ort::LoadDynamicError::Dlopen { error, .. } => in_full(error),
                other => other.to_string(),
            };
            return Err(unusable!(
                "{shown} ({}) can't be loaded as ONNX Runtime: {why}; {REMEDY}",
                place.found
            ));
        }
    };
    let minor = ort::util::probe(&place.path).unwrap_or_default();
    let builder = builder.with_name("tk").with_telemetry(false);
    let environment = match LOG.get() {
        None => builder.build()?,
        Some(&say) => {
            let environment = builder.with_logger(logger(say)).build()?;
            // as without one; ort lets it have all that there is, of every run
            environment.set_log_level(LogLevel::Error);
            environment
        }
    };
    Ok(Loaded { library: Library { path: place.path, minor, found: place.found }, environment })
}

/// Where ONNX Runtime's own messages go, if not to stderr as it writes them.
static LOG: OnceLock<Say> = OnceLock::new();

/// Sends ONNX Runtime's own messages, which are errors, into this log. Nothing may have loaded it before.
pub fn log_to(say: Say) {
    // who asks twice is told by the first
    let _ = LOG.set(say);
}

fn logger(say: Say) -> LoggerFunction {
    Arc::new(move |level, _, _, place, message| {
        let level = match level {
            LogLevel::Verbose | LogLevel::Info => return,
            LogLevel::Warning => Level::Warning,
            LogLevel::Error | LogLevel::Fatal => Level::Error,
        };
        let fields = Map::from_iter([("place".to_owned(), Value::from(place))]);
        say.entry(level, &format!("ONNX Runtime: {message}"), fields);
    })
}

/// An error and its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The first place that has the library.
fn find() -> Result<Place> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if !path.is_file() {
            return Err(unusable!(
                "{VARIABLE} is {}, and there is no such file; unset it, or set it to the library's path",
                path.display()
            ));
        }
        // a relative path would be looked for beside the executable first
        return Ok(Place { path: std::path::absolute(path)?, found: "named by ORT_DYLIB_PATH" });
    }
    let mut looked = Vec::new();
    let executable = std::env::current_exe().and_then(|path| path.canonicalize()).unwrap_or_default();
    let folders: &[&str] = match OPENVINO_FIRST.load(Ordering::Relaxed) {
        true => &["onnxruntime-openvino", "onnxruntime"],
        false => &["onnxruntime"],
    };
    let checkout = checkout_of(&executable).map(|dir| dir.join(".deps")).into_iter().flat_map(|deps| {
        let found = "in .deps/ of the checkout that holds the executable";
        folders.iter().map(move |folder| (deps.join(folder), found))
    });
    let beside = executable.parent().filter(|dir| !is_anybodys(dir));
    let beside = beside.map(|dir| (dir.to_owned(), "beside the executable"));
    for (dir, found) in checkout.chain(beside) {
        if let Some(path) = newest_in(&dir) {
            return Ok(Place { path, found });
        }
        looked.push(dir.display().to_string());
    }
    for name in loader_names() {
        if ort::util::probe(&name).is_some() {
            return Ok(Place { path: name.into(), found: "found by the system's loader" });
        }
        looked.push(format!("the system's loader ({name})"));
    }
    Err(unusable!("ONNX Runtime's library is not there; looked in\n  {}\n{REMEDY}", looked.join("\n  ")))
}

/// The checkout that an executable was built in and still lies in: the nearest folder above it with a Cargo.toml. Not
/// any folder above: code is loaded from there, and in some of them (`/tmp`) anybody may put a `.deps`.
fn checkout_of(executable: &Path) -> Option<&Path> {
    let checkout = executable.ancestors().skip(1).find(|dir| dir.join("Cargo.toml").is_file())?;
    (!is_anybodys(checkout)).then_some(checkout)
}

/// Whether a folder is one that all users share, as `/tmp` is: whoever owns something in it, others may add to it.
fn is_anybodys(dir: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;

        const STICKY_AND_WRITABLE: u32 = 0o1002;
        std::fs::metadata(dir)
            .is_ok_and(|dir| dir.permissions().mode() & STICKY_AND_WRITABLE == STICKY_AND_WRITABLE)
    }
    #[cfg(not(unix))]
    {
        let _ = dir;
        false
    }
}

/// The library in a folder; the highest version where there are several.
fn newest_in(dir: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.is_file() && path.file_name().is_some_and(|name| is_library(&name.to_string_lossy()))
        })
        .collect();
    found.sort_by_key(|path| version_of(path));
    found.pop()
}

fn is_library(name: &str) -> bool {
    if cfg!(windows) {
        name == "onnxruntime.dll"
    } else if cfg!(target_os = "macos") {
        name.starts_with("libonnxruntime.") && name.ends_with("dylib")
    } else {
        name.starts_with("libonnxruntime.so")
    }
}

/// The numbers in a file's name, which order as versions do.
fn version_of(path: &Path) -> Vec<u64> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

fn loader_names() -> Vec<String> {
    let name = format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    if cfg!(target_os = "linux") { vec![name.clone(), format!("{name}.1")] } else { vec![name] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_folders_above_the_executable_only_its_checkout_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let executable = dir.path().join("checkout/target/debug/tk");
        std::fs::create_dir_all(executable.parent().unwrap()).unwrap();
        std::fs::create_dir_all(dir.path().join(".deps/onnxruntime")).unwrap();
        assert_eq!(checkout_of(&executable), None, "nothing above was built from a Cargo.toml");
        std::fs::write(dir.path().join("checkout/Cargo.toml"), "").unwrap();
        assert_eq!(checkout_of(&executable), Some(&*dir.path().join("checkout")));
    }

    #[test]
    #[cfg(unix)]
    fn a_folder_that_all_users_share_is_not_searched() {
        use std::os::unix::fs::PermissionsExt;

        let dir = tempfile::tempdir().unwrap();
        let executable = dir.path().join("target/debug/tk");
        std::fs::write(dir.path().join("Cargo.toml"), "").unwrap();
        assert_eq!(checkout_of(&executable), Some(dir.path()));
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(checkout_of(&executable), None);
        assert!(is_anybodys(dir.path()));
    }

    #[test]
    fn the_highest_version_in_a_folder_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["libonnxruntime.so.1.9.0", "libonnxruntime.so.1.31.1", "libonnxruntime_providers_shared.so"]
        {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        if cfg!(target_os = "linux") {
            assert_eq!(newest_in(dir.path()).unwrap(), dir.path().join("libonnxruntime.so.1.31.1"));
        }
        assert_eq!(newest_in(&dir.path().join("absent")), None);
    }
}
