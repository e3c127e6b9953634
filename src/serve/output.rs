//! Where answers go: standard output, or a file that appears when it is whole and can be gone on with when the
//! run was killed.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use crate::{Result, bail_unusable, files, unusable};

/// A stream of answers, a line each.
pub enum Output {
    Stdout,
    File(Partial),
}

/// A file that is not whole yet: `OUTPUT.partial`, and `OUTPUT.partial.json` with the settings it was begun
/// with.
pub struct Partial {
    target: PathBuf,
    partial: PathBuf,
    settings: PathBuf,
    file: BufWriter<File>,
}

/// What a killed run had written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Answers that are kept: whole windows.
    pub records: usize,
    /// How many of them are errors.
    pub errors: usize,
}

impl Output {
    /// Begins a file; what a killed run left is dropped.
    pub fn begin(target: &Path, settings: &Value) -> Result<Self> {
        files::check_place(target)?;
        let (partial, about) = names(target);
        let file = File::create(&partial).map_err(|e| unusable!("{}: {e}", partial.display()))?;
        files::write(&about, format!("{settings:#}\n"))?;
        Ok(Self::File(Partial {
            target: target.to_owned(),
            partial,
            settings: about,
            file: BufWriter::new(file),
        }))
    }

    /// Goes on with what a killed run left, behind its last whole window. None where nothing was left.
    ///
    /// # Errors
    /// Unusable: the run that was killed had other settings; says which.
    pub fn resume(target: &Path, settings: &Value, window: usize) -> Result<Option<(Self, Done)>> {
        files::check_place(target)?;
        let (partial, about) = names(target);
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
        let mut file = File::options()
            .read(true)
            .write(true)
            .open(&partial)
            .with_context(|| partial.display().to_string())?;
        let (done, end) = whole_windows(&mut file, window)?;
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        let file = BufWriter::new(file);
        let output = Self::File(Partial { target: target.to_owned(), partial, settings: about, file });
        Ok(Some((output, done)))
    }

    /// Whether a killed run left something to go on with.
    pub fn is_begun(target: &Path) -> bool {
        names(target).0.exists()
    }

    /// Appends one window's lines, and hands them to the system.
    pub fn write(&mut self, lines: &[u8]) -> Result<()> {
        match self {
            Self::Stdout => {
                let mut out = std::io::stdout().lock();
                out.write_all(lines)?;
                Ok(out.flush()?)
            }
            Self::File(partial) => partial
                .file
                .write_all(lines)
                .and_then(|()| partial.file.flush())
                .with_context(|| partial.partial.display().to_string()),
        }
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<()> {
        let Self::File(partial) = self else { return Ok(()) };
        let place = || partial.target.display().to_string();
        let file =
            partial.file.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(place)?;
        file.sync_all().with_context(place)?;
        std::fs::rename(&partial.partial, &partial.target).with_context(place)?;
        std::fs::remove_file(&partial.settings).with_context(place)
    }

    /// Leaves nothing behind.
    pub fn discard(self) -> Result<()> {
        let Self::File(partial) = self else { return Ok(()) };
        std::fs::remove_file(&partial.partial)?;
        Ok(std::fs::remove_file(&partial.settings)?)
    }
}

fn names(target: &Path) -> (PathBuf, PathBuf) {
    (files::beside(target, "partial"), files::beside(target, "partial.json"))
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

/// How many answers stand in whole windows, and where the last of them ends.
fn whole_windows(file: &mut File, window: usize) -> Result<(Done, u64)> {
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
        if all.records.is_multiple_of(window) {
            (kept, end) = (all, offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn begun(dir: &Path, text: &str) -> PathBuf {
        let target = dir.join("out.jsonl");
        let mut output = Output::begin(&target, &json!({"model": "a"})).unwrap();
        output.write(text.as_bytes()).unwrap();
        target
    }

    #[test]
    fn what_was_cut_off_is_dropped_to_the_last_whole_window() {
        let dir = tempfile::tempdir().unwrap();
        let text = "{\"index\":0}\n{\"index\":1,\"error\":\"x\"}\n{\"index\":2}\n{\"index\":3}\n{\"ind";
        for (length, records, errors) in
            [(0, 0, 0), (12, 0, 0), (35, 0, 0), (36, 2, 1), (59, 2, 1), (60, 4, 1), (65, 4, 1)]
        {
            let target = begun(dir.path(), &text[..length]);
            let (output, done) = Output::resume(&target, &json!({"model": "a"}), 2).unwrap().unwrap();
            assert_eq!(done, Done { records, errors }, "{length} bytes");
            output.finish().unwrap();
            let kept = std::fs::read_to_string(&target).unwrap();
            assert_eq!(kept.lines().count(), records);
            assert!(text.starts_with(&kept));
        }
    }

    #[test]
    fn other_settings_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let target = begun(dir.path(), "");
        let error = Output::resume(&target, &json!({"model": "b"}), 2).err().unwrap();
        assert!(error.to_string().contains("model was \"a\", is \"b\""), "{error}");
        assert_eq!(crate::error::exit_code(&error), 2);
    }
}
