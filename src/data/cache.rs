//! What tokenizing gives, or a teacher → a file of the user's cache, by the hash of the texts and of all that it depends on.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tempfile::TempPath;

use super::in_order::{self, BLOCK, in_order};
use crate::say::Say;
use crate::{Result, checkpoint, files};

/// Bytes of all files together: what was used the longest ago goes first.
const MOST_BYTES: u64 = 8 << 30;

/// Texts that have fewer bytes are tokenized sooner than they are looked up.
const LEAST_TEXT: usize = 1 << 20;

/// How a file begins.
const MAGIC: &[u8] = b"tk tokens 2\n";

/// Bytes of the hash that a file ends with.
const HASH: usize = 32;

/// What names of files end with.
const ENDING: &str = "tokens";

/// A folder of what was tokenized before.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    most_bytes: u64,
    least_text: usize,
    say: Say,
}

/// All that what is made of items depends on.
pub struct Key {
    hash: Sha256,
    bytes: usize,
}

impl Key {
    /// `of` is what is done with the texts, and by which tokenizer.
    pub fn new(of: &str) -> Self {
        let mut key = Self { hash: Sha256::new(), bytes: 0 };
        key.add(Some(env!("CARGO_PKG_VERSION")));
        // another build of the same version may do it otherwise
        let build = std::env::current_exe().and_then(|path| path.metadata());
        key.add(build.map(|about| format!("{} {:?}", about.len(), about.modified().ok())).ok().as_deref());
        key.add(Some(of));
        key.bytes = 0;
        key
    }

    /// The next text of an item, or that it has none.
    pub fn add(&mut self, text: Option<&str>) {
        self.hash.update(text.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
        self.hash.update(text.unwrap_or_default());
        self.bytes += text.map_or(0, str::len);
    }
}

impl Cache {
    /// The user's: `TK_CACHE`, or `tk` in `XDG_CACHE_HOME`, or in `.cache` of the home directory. None where there is none
    /// of them.
    pub fn of_user(say: Say) -> Option<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = variable("TK_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("tk")))
            .or_else(|| Some(variable("HOME")?.join(".cache/tk")))?;
        Some(Self::in_folder(folder, LEAST_TEXT, say))
    }

    /// One of one's own, which keeps what has at least so many bytes of text.
    pub fn in_folder(folder: PathBuf, least_text: usize, say: Say) -> Self {
        Self { folder, most_bytes: MOST_BYTES, least_text, say }
    }

    /// As [`in_order()`]; what was made under the same key before is read, and what is made is kept. A file that is not
    /// whole is no file. Where nothing can be kept, that is told, and all goes on.
    ///
    /// # Errors
    /// The first that `take` gives.
    pub fn in_order<I: Sync, O: Send + Serialize + DeserializeOwned>(
        &self,
        key: Key,
        items: &[I],
        make: impl Fn(&I) -> Result<O> + Sync,
        mut take: impl FnMut(usize, Result<O>) -> Result<()>,
    ) -> Result<()> {
        if key.bytes < self.least_text {
            return in_order(items, make, take);
        }
        let place = self.place(key);
        let path = &place.path;
        let mut taken = 0;
        match Stored::open(&place, items.len()) {
            Ok(mut stored) => {
                while taken < items.len() {
                    // what was whole a moment ago is so, unless somebody changes it: the rest is made anew
                    let Ok(block) = stored.block::<O>((items.len() - taken).min(BLOCK)) else { break };
                    for made in block {
                        take(taken, Ok(made))?;
                        taken += 1;
                    }
                }
                self.say.detail(format!(
                    "{taken} of {} records' tokens were in {}",
                    items.len(),
                    path.display()
                ));
                if taken == items.len() {
                    return Ok(());
                }
            }
            Err(error) => self.tell_unread(path, &error),
        }
        let mut kept = (taken == 0).then(|| Writing::begin(&place, items.len()));
        in_order::blocks(&items[taken..], make, |made| {
            if let Some(Ok(writing)) = &mut kept {
                let good: Option<Vec<&O>> = made.iter().map(|made| made.as_ref().ok()).collect();
                match good {
                    Some(good) => {
                        if let Err(error) = writing.block(&good) {
                            kept = Some(Err(error));
                        }
                    }
                    None => kept = None,
                }
            }
            for made in made {
                take(taken, made)?;
                taken += 1;
            }
            Ok(())
        })?;
        if let Some(kept) = kept {
            self.put("tokens", kept, path);
        }
        Ok(())
    }

    /// What is made of so many items at once, or what was made under the same key before, if all of it `fits`; however short
    /// the texts are. Returns where it was read, if it was.
    ///
    /// # Errors
    /// Those of `make`; nothing is kept then.
    pub fn at_once<O: Serialize + DeserializeOwned>(
        &self,
        what: &str,
        key: Key,
        items: usize,
        fits: impl Fn(usize, &O) -> bool,
        make: impl FnOnce() -> Result<Vec<O>>,
    ) -> Result<(Vec<O>, Option<PathBuf>)> {
        let place = self.place(key);
        let read = || -> Result<Vec<O>> {
            let mut stored = Stored::open(&place, items)?;
            let all: Vec<O> = stored.block(items)?;
            ensure!(all.iter().enumerate().all(|(i, one)| fits(i, one)), "it holds something else");
            Ok(all)
        };
        match read() {
            Ok(all) => return Ok((all, Some(place.path))),
            Err(error) => self.tell_unread(&place.path, &error),
        }
        let made = make()?;
        let kept = Writing::begin(&place, items).and_then(|mut writing| {
            writing.block(&made)?;
            Ok(writing)
        });
        self.put(what, kept, &place.path);
        Ok((made, None))
    }

    /// The file of what is made under a key.
    fn place(&self, key: Key) -> Place {
        let key: [u8; HASH] = key.hash.finalize().into();
        Place { path: self.folder.join(checkpoint::hex(&key)).with_extension(ENDING), key }
    }

    /// Tells of a file that is there and can't be used.
    fn tell_unread(&self, path: &Path, error: &anyhow::Error) {
        if !error.downcast_ref::<std::io::Error>().is_some_and(is_missing) {
            self.say.detail(format!("{}: {error:#}: it is made anew", path.display()));
        }
    }

    /// Puts a file that was written in its place; where that can't be done, that is told.
    fn put(&self, what: &str, written: Result<Writing>, path: &Path) {
        if let Err(error) = written.and_then(|writing| writing.put(path)).and_then(|()| self.tidy()) {
            let folder = self.folder.display();
            self.say
                .warn(format!("{what} can't be kept in {folder}: {error:#} (TK_CACHE names another folder)"));
        }
    }

    /// Removes what was used the longest ago, until the rest is not too much.
    fn tidy(&self) -> Result<()> {
        let mut all = Vec::new();
        for entry in self.folder.read_dir()? {
            let path = entry?.path();
            let Ok(about) = path.symlink_metadata() else { continue }; // another process was faster
            let used = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let is_temporary =
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(files::TEMPORARY));
            if path.extension().is_some_and(|ending| ending == ENDING) {
                all.push((used, about.len(), path));
            } else if is_temporary && used.elapsed().is_ok_and(|age| age > Duration::from_secs(24 * 60 * 60))
            {
                // of a process that was killed
                std::fs::remove_file(path).or_else(ignore_missing)?;
            }
        }
        all.sort();
        let mut bytes: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, own, path) in all {
            if bytes <= self.most_bytes {
                break;
            }
            std::fs::remove_file(path).or_else(ignore_missing)?;
            bytes -= own;
        }
        Ok(())
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if is_missing(&error) { Ok(()) } else { Err(error) }
}

fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
}

/// A file, and the key that what stands in it was made under.
struct Place {
    path: PathBuf,
    key: [u8; HASH],
}

impl Place {
    /// How the file begins that holds so many items: the magic, the key, the number.
    fn head(&self, items: usize) -> Vec<u8> {
        [MAGIC, &self.key, &(items as u64).to_le_bytes()].concat()
    }
}

/// A file that is being written: its [head](Place::head), blocks each behind its number of bytes, and the hash of all this.
struct Writing {
    path: TempPath,
    file: BufWriter<File>,
    hash: Sha256,
}

impl Writing {
    fn begin(place: &Place, items: usize) -> Result<Self> {
        files::create_folder(place.path.parent().context("no folder")?)?;
        let path = files::temporary_beside(&place.path.with_file_name(ENDING))?;
        let file = BufWriter::new(File::create(&path)?);
        let mut new = Self { path, file, hash: Sha256::new() };
        new.write(&place.head(items))?;
        Ok(new)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }

    fn block(&mut self, items: &[impl Serialize]) -> Result<()> {
        let bytes = postcard::to_stdvec(items)?;
        self.write(&(bytes.len() as u64).to_le_bytes())?;
        self.write(&bytes)
    }

    fn put(mut self, path: &Path) -> Result<()> {
        self.file.write_all(&self.hash.finalize())?;
        self.file.flush()?;
        drop(self.file);
        files::put(self.path, path)
    }
}

/// A file that is whole.
struct Stored {
    file: BufReader<File>,
    /// Bytes of the blocks that are left.
    left: u64,
}

impl Stored {
    /// # Errors
    /// It is not there, or not whole.
    fn open(place: &Place, items: usize) -> Result<Self> {
        let mut file = BufReader::with_capacity(1 << 20, File::open(&place.path)?);
        let wanted = place.head(items);
        let start = wanted.len() as u64;
        let all = file.get_ref().metadata()?.len();
        let left = all.checked_sub(start + HASH as u64).context("it is cut off")?;
        let (mut hash, mut unread, mut buffer) = (Sha256::new(), all - HASH as u64, vec![0; 1 << 16]);
        while unread > 0 {
            let some = &mut buffer[..unread.min(1 << 16) as usize];
            file.read_exact(some)?;
            hash.update(&*some);
            unread -= some.len() as u64;
        }
        let mut written = [0; HASH];
        file.read_exact(&mut written)?;
        ensure!(hash.finalize()[..] == written, "it is damaged");
        file.seek(SeekFrom::Start(0))?;
        let mut head = vec![0; wanted.len()];
        file.read_exact(&mut head)?;
        ensure!(head == wanted, "it holds something else");
        // used: among the last to go
        let _ = file.get_ref().set_modified(SystemTime::now());
        Ok(Self { file, left })
    }

    /// The next block, of so many items.
    fn block<O: DeserializeOwned>(&mut self, items: usize) -> Result<Vec<O>> {
        let mut length = [0; size_of::<u64>()];
        self.file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        self.left =
            self.left.checked_sub(length.saturating_add(size_of::<u64>() as u64)).context("it is cut off")?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes)?;
        let block: Vec<O> = postcard::from_bytes(&bytes)?;
        ensure!(block.len() == items, "{} items where {items} are due", block.len());
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A cache in a folder of its own; what it is asked for, and how many items had to be made.
    struct Bench(tempfile::TempDir);

    impl Bench {
        fn cache(&self) -> Cache {
            Cache {
                folder: self.0.path().join("tk"),
                most_bytes: 1 << 20,
                least_text: 10,
                say: Say { quiet: true, ..Say::default() },
            }
        }

        fn ask(&self, cache: &Cache, of: &str, items: &[String]) -> (Vec<String>, usize) {
            let (made, mut taken) = (AtomicUsize::new(0), Vec::new());
            let mut key = Key::new(of);
            items.iter().for_each(|item| key.add(Some(item)));
            let make = |item: &String| {
                made.fetch_add(1, Ordering::Relaxed);
                ensure!(item != "bad", "a bad one");
                Ok(format!("{of} {item}"))
            };
            let take = |i: usize, made: Result<String>| {
                assert_eq!(i, taken.len());
                taken.push(made.unwrap_or_else(|error| error.to_string()));
                Ok(())
            };
            cache.in_order(key, items, make, take).unwrap();
            (taken, made.into_inner())
        }

        fn files(&self) -> Vec<PathBuf> {
            let mut files: Vec<PathBuf> = match self.0.path().join("tk").read_dir() {
                Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
                Err(_) => Vec::new(),
            };
            files.sort();
            files
        }
    }

    fn items(count: usize, what: &str) -> Vec<String> {
        (0..count).map(|i| format!("{what} {i}")).collect()
    }

    #[test]
    fn what_was_made_is_read_as_long_as_everything_is_the_same() {
        let bench = Bench(tempfile::tempdir().unwrap());
        let cache = bench.cache();
        let some = items(2 * BLOCK + 5, "text");
        let (first, made) = bench.ask(&cache, "a", &some);
        assert_eq!(made, some.len());
        assert_eq!(bench.ask(&cache, "a", &some), (first, 0));
        assert_eq!(bench.ask(&cache, "b", &some).1, some.len(), "another way of tokenizing");
        assert_eq!(bench.ask(&cache, "a", &some[1..]).1, some.len() - 1, "other texts");
        let moved: Vec<String> = some.iter().rev().cloned().collect();
        assert_eq!(bench.ask(&cache, "a", &moved).1, some.len(), "another order");
        let split = ["text 12".to_owned(), "3 and more".to_owned()];
        let other = ["text 123".to_owned(), " and more".to_owned()];
        bench.ask(&cache, "a", &split);
        assert_eq!(bench.ask(&cache, "a", &other).1, 2, "cut at another place");
        assert_eq!(bench.ask(&cache, "a", &items(1, "a")).1, 1, "a short text");
        assert_eq!(bench.ask(&cache, "a", &items(1, "a")).1, 1, "is not kept");
    }

    #[test]
    fn a_file_that_is_not_whole_is_none() {
        let bench = Bench(tempfile::tempdir().unwrap());
        let cache = bench.cache();
        let some = items(BLOCK + 5, "text");
        let (wanted, _) = bench.ask(&cache, "a", &some);
        let path = bench.files().remove(0);
        let whole = std::fs::read(&path).unwrap();
        for at in [0, 5, 13, 30, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(bench.ask(&cache, "a", &some), (wanted.clone(), some.len()), "cut at {at}");
            assert_eq!(std::fs::read(&path).unwrap(), whole, "it is written anew");
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(bench.ask(&cache, "a", &some), (wanted.clone(), some.len()), "damaged at {at}");
        }
        assert_eq!(bench.files().len(), 1);
    }

    #[test]
    fn what_is_made_at_once_is_read_as_long_as_it_is_whole_and_fits() {
        let bench = Bench(tempfile::tempdir().unwrap());
        let cache = bench.cache();
        let made = [vec![1.5f32, -2.0], vec![0.25]];
        let ask = |fits: fn(usize, &Vec<f32>) -> bool| {
            let (found, read) = cache.at_once("rows", Key::new("a"), 2, fits, || Ok(made.to_vec())).unwrap();
            assert_eq!(found, made);
            read
        };
        let fits = |i: usize, row: &Vec<f32>| row.len() == 2 - i;
        assert_eq!(ask(fits), None);
        let path = bench.files().remove(0);
        assert_eq!(ask(fits), Some(path.clone()));
        assert_eq!(ask(|_, row| row.len() == 2), None, "rows of another length");
        let whole = std::fs::read(&path).unwrap();
        for at in [0, 5, 13, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            for bytes in [&damaged[..], &whole[..at]] {
                std::fs::write(&path, bytes).unwrap();
                assert_eq!(ask(fits), None, "at {at}");
                assert_eq!(std::fs::read(&path).unwrap(), whole, "it is written anew");
            }
        }
        // what was made under another key, in its place
        cache.at_once("rows", Key::new("other"), 2, fits, || Ok(vec![vec![7.0f32, 7.0], vec![7.0]])).unwrap();
        let other = bench.files().into_iter().find(|own| *own != path).unwrap();
        std::fs::copy(other, &path).unwrap();
        assert_eq!(ask(fits), None, "another's file");
        let failed = cache.at_once("rows", Key::new("b"), 2, fits, || anyhow::bail!("no"));
        assert!(failed.is_err() && bench.files().len() == 2);
    }

    #[test]
    fn where_an_item_can_not_be_made_nothing_is_kept() {
        let bench = Bench(tempfile::tempdir().unwrap());
        let mut some = items(BLOCK + 5, "text");
        some[BLOCK] = "bad".to_owned();
        let (taken, _) = bench.ask(&bench.cache(), "a", &some);
        assert_eq!((taken[BLOCK].as_str(), taken.len()), ("a bad one", some.len()));
        assert_eq!(bench.files(), [] as [PathBuf; 0]);
    }

    #[test]
    fn what_was_used_the_longest_ago_goes_first() {
        let bench = Bench(tempfile::tempdir().unwrap());
        let some = |what| items(1000, what);
        bench.ask(&bench.cache(), "a", &some("one"));
        let one = bench.files().remove(0);
        let size = one.metadata().unwrap().len();
        let cache = Cache { most_bytes: 2 * size + size / 2, ..bench.cache() };
        bench.ask(&cache, "a", &some("two"));
        let two = bench.files().into_iter().find(|path| *path != one).unwrap();
        for (path, age) in [(&one, 200), (&two, 100)] {
            let used = SystemTime::now() - Duration::from_secs(age);
            File::options().write(true).open(path).unwrap().set_modified(used).unwrap();
        }
        assert_eq!(bench.ask(&cache, "a", &some("one")).1, 0); // used again
        bench.ask(&cache, "a", &some("six"));
        assert!(one.exists() && !two.exists() && bench.files().len() == 2, "{:?}", bench.files());
        // larger than all that is allowed
        bench.ask(&Cache { most_bytes: size / 2, ..bench.cache() }, "a", &some("ten"));
        assert_eq!(bench.files(), [] as [PathBuf; 0]);
    }

    #[test]
    fn where_nothing_can_be_kept_all_goes_on() {
        let bench = Bench(tempfile::tempdir().unwrap());
        std::fs::write(bench.0.path().join("tk"), "a file").unwrap();
        let some = items(100, "text");
        assert_eq!(bench.ask(&bench.cache(), "a", &some).1, 100);
    }
}
