//! Where answers go: standard output, a pipe, or a file that appears when it is whole and can be gone on with when
//! the run was killed.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use super::matrix::MatrixFile;
use crate::files::Destination;
use crate::{Result, bail_unusable, files, say, unusable};

/// A stream of answers, a line each.
pub enum Sink {
    Stdout,
    /// What is no file, with its name.
    Stream(File, String),
    File(Partial),
}

/// A file that is not whole yet: `OUTPUT.partial`, and `OUTPUT.partial.json` with the settings it was begun
/// with.
pub struct Partial {
    target: PathBuf,
    partial: PathBuf,
    settings: PathBuf,
    /// Locked, so that no other run writes to it.
    file: BufWriter<File>,
}

/// What a killed run had written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Answers that are kept: whole chunks.
    pub records: usize,
    /// How many of them are errors.
    pub errors: usize,
}

impl Sink {
    /// Opens what is no file, where nothing can be resumed.
    ///
    /// # Errors
    /// Unusable: it can't be opened.
    pub fn stream(destination: &Destination) -> Result<Self> {
        if *destination == Destination::STDOUT {
            return Ok(Self::Stdout);
        }
        Ok(Self::Stream(destination.open_stream()?, destination.to_string()))
    }

    /// Begins a file; what a killed run left is dropped.
    ///
    /// # Errors
    /// Unusable: another run is writing it, or it can't be written.
    pub fn begin(target: &Path, settings: &Value) -> Result<Self> {
        let [partial, about] = names(target);
        let file = open(&partial, File::options().read(true).write(true).create(true).truncate(false))?;
        file.set_len(0).with_context(|| partial.display().to_string())?;
        files::write(&about, format!("{settings:#}\n"))?;
        let file = BufWriter::new(file);
        Ok(Self::File(Partial { target: target.to_owned(), partial, settings: about, file }))
    }

    /// Goes on with what a killed run left, behind its last whole chunk. None where nothing was left.
    ///
    /// # Errors
    /// Unusable: the run that was killed had other settings; says which. Or another run is writing it.
    pub fn resume(target: &Path, settings: &Value, chunk: usize) -> Result<Option<(Self, Done)>> {
        let [partial, about] = names(target);
        if !partial.exists() || !about.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&about).with_context(|| about.display().to_string())?;
        let begun: Value = serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", about.display()))?;
        let differing = differing(&begun, settings);
        if !differing.is_empty() {
            bail_unusable!(
                "{} was begun with other settings ({}): give the same ones, or leave --resume out to start over",
                partial.display(),
                differing.join("; ")
            );
        }
        let mut file = open(&partial, File::options().read(true).write(true))?;
        let place = || partial.display().to_string();
        let (done, end) = whole_chunks(&mut file, chunk).with_context(place)?;
        file.set_len(end).with_context(place)?;
        file.seek(SeekFrom::Start(end)).with_context(place)?;
        let file = BufWriter::new(file);
        let output = Self::File(Partial { target: target.to_owned(), partial, settings: about, file });
        Ok(Some((output, done)))
    }

    /// Whether a killed run left something to go on with.
    pub fn is_begun(target: &Path) -> bool {
        names(target)[0].exists()
    }

    /// Appends one chunk's lines, and hands them to the system.
    pub fn write(&mut self, lines: &[u8]) -> Result<()> {
        match self {
            Self::Stdout => say::print(lines),
            Self::Stream(stream, name) => stream.write_all(lines).with_context(|| format!("writing {name}")),
            Self::File(partial) => partial
                .file
                .write_all(lines)
                .and_then(|()| partial.file.flush())
                .with_context(|| partial.partial.display().to_string()),
        }
    }

    /// Gives the file its name; or makes a matrix of its lines under that name.
    pub fn finish(self, matrix: Option<MatrixFile>) -> Result<()> {
        let Self::File(partial) = self else { return Ok(()) };
        let place = || partial.target.display().to_string();
        let file =
            partial.file.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(place)?;
        match matrix {
            None => {
                file.sync_all().with_context(place)?;
                files::replace(&partial.partial, &partial.target).with_context(place)?;
            }
            Some(matrix) => {
                let write = |path: &Path| matrix.write(&partial.partial, path);
                files::write_through_rename(&partial.target, write)?;
                std::fs::remove_file(&partial.partial)
                    .with_context(|| partial.partial.display().to_string())?;
            }
        }
        std::fs::remove_file(&partial.settings).with_context(|| partial.settings.display().to_string())
    }

    /// Leaves nothing behind.
    pub fn discard(self) -> Result<()> {
        let Self::File(partial) = self else { return Ok(()) };
        for path in [partial.partial, partial.settings] {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// What an unfinished output stands in: `OUTPUT.partial` and its settings.
pub fn names(target: &Path) -> [PathBuf; 2] {
    [files::beside(target, "partial"), files::beside(target, "partial.json")]
}

/// Opens an unfinished output for this run alone.
fn open(partial: &Path, options: &std::fs::OpenOptions) -> Result<File> {
    loop {
        let file = options.open(partial).map_err(|e| unusable!("{}: {e}", partial.display()))?;
        files::try_lock_file(&file, partial)?;
        // a run that ended just now may have given this very file its name
        if is_at(&file, partial).with_context(|| partial.display().to_string())? {
            return Ok(file);
        }
    }
}

/// Whether a path still leads to this open file.
fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let own = file.metadata()?;
        match std::fs::metadata(path) {
            Ok(found) => Ok((found.dev(), found.ino()) == (own.dev(), own.ino())),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path, ErrorKind::NotFound);
        Ok(true)
    }
}

fn differing(begun: &Value, now: &Value) -> Vec<String> {
    let (Some(begun), Some(now)) = (begun.as_object(), now.as_object()) else {
        return vec!["its settings can't be read".to_owned()];
    };
    let mut keys: Vec<&String> = begun.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .filter(|key| begun.get(*key) != now.get(*key))
        .map(|key| {
            let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
            format!("{key} was {}, is {}", shown(begun.get(key)), shown(now.get(key)))
        })
        .collect()
}

/// How many answers stand in whole chunks, and where the last of them ends.
fn whole_chunks(file: &mut File, chunk: usize) -> Result<(Done, u64)> {
    let mut lines = BufReader::new(file);
    let (mut all, mut kept, mut offset, mut end) = (Done::default(), Done::default(), 0, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        offset += lines.read_until(b'\n', &mut line)? as u64;
        if line.last() != Some(&b'\n') {
            return Ok((kept, end)); // the end, or a line that was cut off
        }
        let Ok(Value::Object(record)) = serde_json::from_slice(&line) else {
            return Ok((kept, end));
        };
        all.records += 1;
        all.errors += usize::from(record.contains_key("error"));
        if all.records.is_multiple_of(chunk) {
            (kept, end) = (all, offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::predict::matrix::Matrix;

    const MATRIX: MatrixFile = MatrixFile { form: Matrix::Npy, width: 1, first: 0 };

    fn begun(dir: &Path, text: &str) -> PathBuf {
        let target = dir.join("out.jsonl");
        let mut output = Sink::begin(&target, &json!({"model": "a"})).unwrap();
        output.write(text.as_bytes()).unwrap();
        target
    }

    #[test]
    fn what_was_cut_off_is_dropped_to_the_last_whole_chunk() {
        let dir = tempfile::tempdir().unwrap();
        let text = "{\"index\":0}\n{\"index\":1,\"error\":\"x\"}\n{\"index\":2}\n{\"index\":3}\n{\"ind";
        for (length, records, errors) in
            [(0, 0, 0), (12, 0, 0), (35, 0, 0), (36, 2, 1), (59, 2, 1), (60, 4, 1), (65, 4, 1)]
        {
            let target = begun(dir.path(), &text[..length]);
            let (output, done) = Sink::resume(&target, &json!({"model": "a"}), 2).unwrap().unwrap();
            assert_eq!(done, Done { records, errors }, "{length} bytes");
            output.finish(None).unwrap();
            let kept = std::fs::read_to_string(&target).unwrap();
            assert_eq!(kept.lines().count(), records);
            assert!(text.starts_with(&kept));
        }
    }

    #[test]
    fn other_settings_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let target = begun(dir.path(), "");
        let error = Sink::resume(&target, &json!({"model": "b"}), 2).err().unwrap();
        assert!(error.to_string().contains("model was \"a\", is \"b\""), "{error}");
        assert_eq!(crate::error::exit_code(&error), 2);
    }

    #[test]
    fn a_matrix_takes_the_place_of_its_lines() {
        let dir = tempfile::tempdir().unwrap();
        let target = begun(dir.path(), "{\"index\":0,\"embedding\":[1.5]}\n{\"ind");
        let (mut output, done) = Sink::resume(&target, &json!({"model": "a"}), 1).unwrap().unwrap();
        assert_eq!(done.records, 1);
        output.write(b"{\"index\":1}\n").unwrap();
        let error = output.finish(Some(MATRIX)).unwrap_err();
        assert!(format!("{error:#}").contains("out.jsonl.partial:2: no embedding"), "{error:#}");
        assert!(!target.exists() && Sink::is_begun(&target), "what was computed is kept");

        let target = begun(dir.path(), "{\"index\":0,\"embedding\":[1.5]}\n");
        let (output, _) = Sink::resume(&target, &json!({"model": "a"}), 1).unwrap().unwrap();
        output.finish(Some(MATRIX)).unwrap();
        assert!(std::fs::read(&target).unwrap().ends_with(&1.5f32.to_le_bytes()));
        assert!(names(&target).iter().all(|path| !path.exists()));
    }

    #[test]
    #[cfg(unix)]
    fn two_runs_do_not_write_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out.jsonl");
        let settings = json!({"model": "a"});
        let mut first = Sink::begin(&target, &settings).unwrap();
        first.write(b"{}\n").unwrap();
        let second = [Sink::begin(&target, &settings).err(), Sink::resume(&target, &settings, 1).err()];
        for error in second {
            let error = error.unwrap();
            assert!(error.to_string().contains("by another run"), "{error}");
            assert_eq!(crate::error::exit_code(&error), 2);
        }
        first.finish(None).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "{}\n");
        Sink::begin(&target, &settings).unwrap();
    }
}
