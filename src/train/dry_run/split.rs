//! Files of records → what there is in it.

use std::collections::HashMap;
use std::path::PathBuf;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::twins::Twins;
use crate::Result;
use crate::data::records::{self, Files, Place, Source};
use crate::data::tokens::Tokenizer;
use crate::task::{Example, Look, RecordFlags, Task};
use crate::train::plan::shuffle;

/// Records whose lengths are looked at.
const SAMPLE: usize = 20_000;

/// Letters and digits that a text has at least.
const LEAST_LETTERS: usize = 3;

/// What there is in files of records.
#[derive(Clone, Debug, Serialize)]
pub struct Split {
    /// `training` or `evaluation`.
    #[serde(skip)]
    pub name: &'static str,
    /// The file, or the first one and how many others there are.
    pub path: String,
    pub files: Vec<PathBuf>,
    pub records: usize,
    /// How many the files have, where these are some of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drawn_from: Option<usize>,
    /// Each column of the first record, and what it is read as, where it is read.
    pub columns: Vec<(String, Option<&'static str>)>,
    /// Each label and how many there are of it, from the most frequent.
    pub labels: Vec<(String, usize)>,
    /// Records with fewer than three letters and digits.
    pub short_texts: usize,
    /// Those that say what an earlier one says.
    pub duplicates: Twins,
    /// What is made of the records: one of each, or several windows.
    pub examples: usize,
    /// Examples of which something is cut off.
    pub cut: usize,
    pub lengths: Lengths,
}

/// Tokens of texts before anything is cut off.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Lengths {
    /// How many were looked at: all, or some that were drawn.
    pub of: usize,
    pub p50: usize,
    pub p90: usize,
    pub p99: usize,
    pub longest: usize,
    /// How many of them are longer than the maximum length.
    pub above_maximum: usize,
}

/// What records are read with.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    pub task: &'a Task,
    pub tokenizer: &'a Tokenizer,
    pub records: &'a RecordFlags,
    pub max_length: usize,
    pub seed: u64,
}

impl Split {
    /// Describes files, of which these are the records and the examples.
    ///
    /// # Errors
    /// Unusable: it can't be read.
    pub fn new(
        name: &'static str,
        files: &Files,
        looks: &[Look],
        examples: &[Example],
        duplicates: Twins,
        reader: &Reader,
    ) -> Result<Self> {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for label in looks.iter().flat_map(|look| &look.labels) {
            *counts.entry(label).or_default() += 1;
        }
        let mut labels: Vec<(String, usize)> =
            counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        labels.sort_by(|(a, x), (b, y)| y.cmp(x).then(a.cmp(b)));
        Ok(Self {
            name,
            path: files.to_string(),
            files: files.paths().to_vec(),
            records: looks.len(),
            drawn_from: files.drawn_from(),
            columns: columns(files, reader)?,
            labels,
            short_texts: looks.iter().filter(|look| letters(look) < LEAST_LETTERS).count(),
            duplicates,
            examples: examples.len(),
            cut: examples.iter().filter(|example| example.is_cut()).count(),
            lengths: Lengths::of(looks, reader)?,
        })
    }

    /// A place of one of its records, in words.
    pub fn line(&self, place: Place) -> String {
        match &self.files[..] {
            [_] => format!("line {}", place.line),
            files => format!("line {} of {}", place.line, files[place.file].display()),
        }
    }

    /// The share of the most frequent label.
    pub fn largest_share(&self) -> f64 {
        let all: usize = self.labels.iter().map(|(_, count)| count).sum();
        self.labels.first().map_or(0.0, |(_, count)| *count as f64 / all as f64)
    }

    /// Labels that differ in case and spaces alone, together.
    pub fn similar_labels(&self) -> Vec<Vec<&str>> {
        let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
        for (label, _) in &self.labels {
            let plain = label.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
            match groups.iter_mut().find(|(known, _)| *known == plain) {
                Some((_, group)) => group.push(label),
                None => groups.push((plain, vec![label])),
            }
        }
        groups.into_iter().map(|(_, group)| group).filter(|group| group.len() > 1).collect()
    }
}

impl Lengths {
    fn of(looks: &[Look], reader: &Reader) -> Result<Self> {
        let mut drawn: Vec<usize> = (0..looks.len()).collect();
        if drawn.len() > SAMPLE {
            shuffle(&mut drawn, &mut ChaCha8Rng::seed_from_u64(reader.seed));
            drawn.truncate(SAMPLE);
        }
        let texts: Vec<&(String, Option<String>)> = drawn.iter().flat_map(|&i| &looks[i].texts).collect();
        let length = |(text, pair): &&(String, Option<String>)| {
            Ok(reader.tokenizer.encode(text, pair.as_deref(), usize::MAX)?.len())
        };
        let mut lengths = texts.par_iter().map(length).collect::<Result<Vec<usize>>>()?;
        lengths.sort_unstable();
        let at = |share: f64| {
            let place = (share * lengths.len() as f64).ceil() as usize;
            lengths.get(place.max(1) - 1).copied().unwrap_or_default()
        };
        let above_maximum = lengths.iter().filter(|&&length| length > reader.max_length).count();
        Ok(Self {
            of: drawn.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            longest: at(1.0),
            above_maximum,
        })
    }
}

fn letters(look: &Look) -> usize {
    let texts = look.texts.iter().flat_map(|(text, pair)| [Some(text), pair.as_ref()]).flatten();
    texts.flat_map(|text| text.chars()).filter(|c| c.is_alphanumeric()).take(LEAST_LETTERS).count()
}

/// The columns of the first record, with what each is read as.
fn columns(files: &Files, reader: &Reader) -> Result<Vec<(String, Option<&'static str>)>> {
    let (how, columns) = reader.task.reading(reader.records);
    let mut first = None;
    for path in files.paths() {
        first = records::read(&Source::Path(path.to_owned()), &how)?.find_map(|row| row.ok()?.ok());
        if first.is_some() {
            break;
        }
    }
    let names = first.into_iter().flat_map(|row| row.fields.into_iter().map(|(name, _)| name));
    let read_as = |name: &str| columns.all().find(|(_, column)| *column == name).map(|(wanted, _)| wanted);
    Ok(names.map(|name| (name.clone(), read_as(&name))).collect())
}
