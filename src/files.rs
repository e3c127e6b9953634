//! Files that are either whole or not there: written under a name of their own and renamed. And what can't be renamed
//! over, such as a pipe, written to directly.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::TempPath;

use crate::{Result, bail_unusable, unusable};

/// What names of temporary files and folders begin with.
pub const TEMPORARY: &str = ".tk-";

/// Links that are followed before they are taken for a circle, as Linux does.
const MOST_LINKS: usize = 40;

/// Whether a name can stand as one part of a path and of an address: letters and digits of ASCII, `-`, `_` and `.`, and not
/// dots alone.
pub fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    name.chars().all(plain) && !name.trim_matches('.').is_empty()
}

/// Lets `write` fill a temporary file in the folder of `path`, which no other process has the name of, then renames it
/// to `path`. When `write` fails, neither name is left changed.
pub fn write_through_rename(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let written = || -> Result<()> {
        let temporary = temporary_beside(path)?;
        write(&temporary)?;
        put(temporary, path)
    };
    written().with_context(|| format!("writing {}", path.display()))
}

/// Writes `bytes` to `path` through a rename.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    write_through_rename(path, |temporary| Ok(std::fs::write(temporary, bytes)?))
}

/// An empty file in the folder of `path`, removed when it is dropped; [`put`] gives it its name.
pub fn temporary_beside(path: &Path) -> Result<TempPath> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY).suffix(".tmp");
    #[cfg(unix)]
    {
        // as any new file has them: less those of the umask
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    Ok(builder.tempfile_in(folder_of(path))?.into_temp_path())
}

/// Gives a temporary file its name, once its bytes are on the disk.
pub fn put(temporary: TempPath, path: &Path) -> Result<()> {
    File::open(&temporary)?.sync_all()?;
    replace(&temporary, path)?;
    // the name is gone, so there is nothing to remove
    let _ = temporary.keep();
    Ok(())
}

/// Renames a file to `path`, with the permissions of the file that stands there, and waits until the disk has the name.
pub fn replace(temporary: &Path, path: &Path) -> std::io::Result<()> {
    if let Ok(old) = std::fs::metadata(path)
        && old.is_file()
    {
        std::fs::set_permissions(temporary, old.permissions())?;
    }
    std::fs::rename(temporary, path)?;
    sync_folder(folder_of(path))
}

/// Waits until the disk has the names in a folder: without it a rename may be lost when the power is.
pub fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(()); // a folder can't be opened there
    }
    match File::open(folder)?.sync_all() {
        // a file system that can't do it for folders
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// The folder that a path's last name stands in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `path` with `.extension` appended to its name.
pub fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.file_name().map(OsString::from).unwrap_or_default();
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}

/// Where a path leads when its last name is a link, and that one's as well: a path that is no link, or is not there.
///
/// # Errors
/// The links go round in a circle.
pub fn behind_links(path: &Path) -> std::io::Result<PathBuf> {
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        match std::fs::read_link(&at) {
            Ok(to) => at = folder_of(&at).join(to),
            Err(_) => return Ok(at),
        }
    }
    Err(std::io::Error::other("links that lead to each other"))
}

/// Makes a folder and those above it, where a link leads if it is one.
pub fn create_folder(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(behind_links(path)?)
}

/// Removes what a process that was killed left of its temporary files and folders. Nobody else may be writing here:
/// see [`try_lock`].
pub fn sweep(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// Locks a folder for this process as long as the result is kept; waits for one that holds it. None where the file
/// system has no locks.
///
/// # Errors
/// The folder can't be opened.
pub fn lock(folder: &Path) -> std::io::Result<Option<File>> {
    if cfg!(not(unix)) {
        return Ok(None);
    }
    let file = File::open(folder)?;
    loop {
        match file.lock() {
            Ok(()) => return Ok(Some(file)),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Ok(None),
        }
    }
}

/// The same without waiting.
///
/// # Errors
/// Unusable: another process holds it, or it can't be opened.
pub fn try_lock(folder: &Path) -> Result<Option<File>> {
    if cfg!(not(unix)) {
        return Ok(None);
    }
    let file = File::open(folder).map_err(|e| unusable!("{}: {e}", folder.display()))?;
    Ok(try_lock_file(&file, folder)?.then_some(file))
}

/// Locks an open file, which `path` names in the error. False where the file system has no locks.
///
/// # Errors
/// Unusable: another process holds it.
pub fn try_lock_file(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(std::fs::TryLockError::WouldBlock) => bail_unusable!(
            "{} is being written by another run of tk: wait for it, or name another output",
            path.display()
        ),
        Err(std::fs::TryLockError::Error(_)) => Ok(false),
    }
}

/// What an output's name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A file, there or not yet, which is written beside its name and renamed; the path is what lies behind all links.
    File(PathBuf),
    /// A pipe, a device or another thing that is no file: written to as it is, never renamed over.
    Stream(PathBuf),
    /// A file that the process was started with, `/dev/stdout` or `/dev/fd/N`: written to where it stands.
    Descriptor(i32),
}

impl Destination {
    /// Standard output.
    pub const STDOUT: Self = Self::Descriptor(1);

    /// Finds out, before any work is done, whether something can be written under a name, and how.
    ///
    /// # Errors
    /// Unusable: it is a directory, its folder is not there, or it may not be written.
    pub fn of(path: &Path) -> Result<Self> {
        let shown = path.display();
        if path.is_dir() {
            bail_unusable!("{shown} is a directory; a file was expected");
        }
        let bytes = path.as_os_str().as_encoded_bytes();
        if path.file_name().is_none() || bytes.last().is_some_and(|&b| std::path::is_separator(b.into())) {
            bail_unusable!("\"{shown}\" is no name of a file");
        }
        if let Some(number) = descriptor(path) {
            check_descriptor(number).map_err(|e| unusable!("{shown} can't be written: {e}"))?;
            return Ok(Self::Descriptor(number));
        }
        match std::fs::metadata(path) {
            Ok(about) if !about.is_file() => return Ok(Self::Stream(path.to_owned())),
            Ok(_) => {
                let opened = File::options().write(true).open(path);
                opened.map_err(|e| unusable!("{shown} can't be written: {e}"))?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => bail_unusable!("{shown}: {e}"),
        }
        let file = behind_links(path).map_err(|e| unusable!("{shown}: {e}"))?;
        let folder = folder_of(&file);
        if !folder.is_dir() {
            bail_unusable!("{shown}: the folder {} is not there", folder.display());
        }
        Ok(Self::File(file))
    }

    /// Opens what is no file; a pipe waits for its reader.
    ///
    /// # Errors
    /// Unusable: it can't be opened.
    pub fn open_stream(&self) -> Result<File> {
        match self {
            Self::File(path) => {
                bail_unusable!("{} is a file, a pipe or a device was expected", path.display())
            }
            Self::Stream(path) => File::options().write(true).open(path),
            Self::Descriptor(number) => duplicate(*number),
        }
        .map_err(|e| unusable!("{self} can't be opened: {e}"))
    }

    /// Writes the whole of an output at once.
    pub fn write(&self, bytes: impl AsRef<[u8]>) -> Result<()> {
        match self {
            Self::File(path) => write(path, bytes),
            _ => {
                let mut stream = self.open_stream()?;
                stream.write_all(bytes.as_ref()).with_context(|| format!("writing {self}"))
            }
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::File(path) | Self::Stream(path) => path.display().fmt(f),
            Self::Descriptor(1) => f.write_str("standard output"),
            Self::Descriptor(number) => write!(f, "/dev/fd/{number}"),
        }
    }
}

/// The number that a path under `/dev/fd`, or a link to one, gives an open file of this process.
fn descriptor(path: &Path) -> Option<i32> {
    let own = ["/dev/fd", "/proc/self/fd"].iter().find_map(|folder| std::fs::canonicalize(folder).ok())?;
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        if folder_of(&at).canonicalize().is_ok_and(|folder| folder == own) {
            return at.file_name().and_then(OsStr::to_str)?.parse().ok();
        }
        at = folder_of(&at).join(std::fs::read_link(&at).ok()?);
    }
    None
}

/// Whether the process was started with this file, open for writing.
#[cfg(unix)]
fn check_descriptor(number: i32) -> std::io::Result<()> {
    // SAFETY: both calls only ask; a number that is not open is an error.
    let (flags, mode) = unsafe { (libc::fcntl(number, libc::F_GETFD), libc::fcntl(number, libc::F_GETFL)) };
    // what tk opened itself is closed on exec, and what it was started with can't be
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(std::io::Error::other("no such file is open"));
    }
    if mode & libc::O_ACCMODE == libc::O_RDONLY {
        return Err(std::io::Error::other("it is open for reading"));
    }
    Ok(())
}

/// A second handle of an open file, which writes where the first stands.
#[cfg(unix)]
fn duplicate(number: i32) -> std::io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the call only makes a number; one that is not open is an error.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the number was made above, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(copy) })
}

#[cfg(not(unix))]
fn check_descriptor(_: i32) -> std::io::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
fn duplicate(_: i32) -> std::io::Result<File> {
    Err(ErrorKind::Unsupported.into())
}

/// Bytes that [`beginning`] reads.
const BEGINNING: u64 = 1 << 20;

/// The first part of a text file; none where there is no file.
///
/// # Errors
/// Unusable: it can't be read.
pub fn beginning(path: &Path) -> Result<Option<String>> {
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| unusable!("{}: {e}", path.display()))?,
    };
    let mut bytes = Vec::new();
    file.take(BEGINNING).read_to_end(&mut bytes).map_err(|e| unusable!("{}: {e}", path.display()))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_keeps_its_permissions_and_a_failure_leaves_it_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, "one").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let plain = dir.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        assert_eq!(mode(&path), mode(&plain));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, "two").unwrap();
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), mode(&path)), ("two", 0o640));
        let failed = write_through_rename(&path, |temporary| {
            std::fs::write(temporary, "half")?;
            anyhow::bail!("no")
        });
        assert!(format!("{:#}", failed.unwrap_err()).ends_with("a: no"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(names(dir.path()), ["a", "plain"]);
    }

    #[test]
    fn a_destination_is_what_lies_behind_the_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("far")).unwrap();
        symlink("far/there", path("second")).unwrap();
        symlink(path("second"), path("first")).unwrap();
        let found = Destination::of(&path("first")).unwrap();
        assert_eq!(found, Destination::File(path("far/there"))); // which is not there yet
        found.write("x").unwrap();
        assert_eq!(std::fs::read_to_string(path("first")).unwrap(), "x");
        assert!(path("first").is_symlink() && path("second").is_symlink());
        assert_eq!(Destination::of(&path("far/there")).unwrap(), found);

        assert_eq!(Destination::of(Path::new("/dev/null")).unwrap(), Destination::Stream("/dev/null".into()));
        symlink("/dev/null", path("nothing")).unwrap();
        assert_eq!(Destination::of(&path("nothing")).unwrap(), Destination::Stream(path("nothing")));
        for name in ["/dev/stdout", "/dev/fd/1", "/dev/fd/../fd/1"] {
            assert_eq!(Destination::of(Path::new(name)).unwrap(), Destination::STDOUT, "{name}");
        }

        symlink("round", path("circle")).unwrap();
        symlink("circle", path("round")).unwrap();
        symlink("absent/file", path("lost")).unwrap();
        let own = File::create(path("own")).unwrap();
        let own = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own));
        for (name, said) in [
            (path("circle"), "levels of symbolic links"),
            (path("lost"), "absent is not there"),
            (path("far"), "is a directory"),
            (path("new/"), "no name of a file"),
            ("".into(), "no name of a file"),
            (own.into(), "no such file is open"),
            ("/dev/fd/987".into(), "no such file is open"),
        ] {
            let error = Destination::of(&name).unwrap_err();
            assert!(error.to_string().contains(said), "{}: {error}", name.display());
            assert_eq!(crate::error::exit_code(&error), 2);
        }
    }

    #[test]
    fn a_folder_is_locked_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let held = try_lock(dir.path()).unwrap();
        let error = try_lock(dir.path()).unwrap_err();
        assert!(error.to_string().contains("another run"), "{error}");
        drop(held);
        assert!(try_lock(dir.path()).unwrap().is_some());
    }
}
