//! Token classification: a label a word, and entities of words.

pub mod decode;
pub mod entities;
pub mod labels;
pub mod metrics;
pub mod offsets;
pub mod scheme;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::decode::{Aggregation, Piece};
use self::offsets::OffsetUnit;
use self::scheme::{OUTSIDE, Scheme, TagScheme, Tagged};
use super::examples::{Fields, refuse};
use super::text_classification::{argmax, default_names, labels_of, short, write_labels};
use super::{Dim, Example, Measured, Metrics, Output, Outputs, Target};
use crate::data::batch::Encoding;
use crate::data::records::{self, BadRow, Columns, Row};
use crate::data::tokens::{Pieces, Tokenizer};
use crate::data::windows::windows;
use crate::model::{Head, ModelConfig};
use crate::{Result, unusable};

/// The labels of words, and how they mark entities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClassification {
    /// In the order of `id2label`.
    pub labels: Vec<String>,
    pub scheme: Scheme,
}

/// What is measured, beside the loss.
pub(super) const METRICS: &[&str] = &["precision", "recall", "f1", "accuracy"];

/// The key of config.json that keeps the scheme, which labels alone do not always tell.
const SCHEME: &str = "tag_scheme";

/// Neighbouring windows share up to a quarter of their room.
const SHARED: usize = 4;

/// The columns and the reading of words and their tags.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct TagFields {
    /// For token-classification, the column of the words [default: tokens].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_column: Option<String>,
    /// For token-classification, the column of the words' tags [default: tags].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags_column: Option<String>,
    /// How tags mark entities [default: found in the training data].
    #[arg(long, value_enum, value_name = "SCHEME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag_scheme: Option<TagScheme>,
    /// Learn a word's label on all of its tokens, instead of on the first alone.
    #[arg(long, help_heading = "Records")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub label_all_pieces: bool,
}

impl TagFields {
    /// The first flag that is set.
    pub fn first(&self) -> Option<&'static str> {
        [
            ("--tokens-column", self.tokens_column.is_some()),
            ("--tags-column", self.tags_column.is_some()),
            ("--tag-scheme", self.tag_scheme.is_some()),
            ("--label-all-pieces", self.label_all_pieces),
        ]
        .into_iter()
        .find_map(|(flag, is_set)| is_set.then_some(flag))
    }
}

/// Words and what their tags are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    /// The line of the file.
    pub line: usize,
    pub tokens: Vec<String>,
    pub tags: Vec<String>,
}

/// What a window of a sentence ought to give.
#[derive(Clone, Debug, PartialEq)]
pub struct Tags {
    /// Which of the file's sentences it is of.
    pub sentence: usize,
    /// The label ids of all words of the sentence.
    pub gold: Arc<[u32]>,
    /// (T): the label of each token that is learnt.
    pub wanted: Vec<Option<u32>>,
    /// The tokens that this window predicts words by, and which words they are the first of.
    pub words: Vec<(usize, usize)>,
}

impl Tags {
    /// How many tokens are learnt.
    pub fn count(&self) -> usize {
        self.wanted.iter().flatten().count()
    }
}

/// Reads every sentence of a file.
///
/// # Errors
/// Unusable: the file can't be read, has no sentences, or has some without words or without a tag a word; the first of
/// them are listed with file and line.
pub fn read(path: &Path, fields: &Fields) -> Result<Vec<Sentence>> {
    let of = &fields.tags;
    let columns =
        Columns::default().with("tokens", of.tokens_column.clone()).with("tags", of.tags_column.clone());
    records::read_examples(path, &fields.how(), |row| {
        let tokens = row.words(&columns, "tokens")?;
        let tags = row.labels(&columns, "tags")?;
        if tokens.is_empty() {
            return Err(row.bad("the sentence has no words"));
        }
        if tokens.len() != tags.len() {
            return Err(row.bad(format!(
                "{} words and {} tags: a tag a word was expected",
                tokens.len(),
                tags.len()
            )));
        }
        Ok(Sentence { line: row.line, tokens, tags })
    })
}

impl TokenClassification {
    /// Reads `id2label` of a fine-tuned model, and the scheme that tk has kept; else the one that the labels show.
    ///
    /// # Errors
    /// Labels that are inconsistent, or a scheme that tk does not know.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        let labels = match labels_of(config)? {
            Some(labels) => labels,
            None => default_names(2),
        };
        let scheme = match config.raw.get(SCHEME) {
            None | Some(Value::Null) => Scheme::of_labels(labels.iter().map(String::as_str)),
            Some(name) => serde_json::from_value(name.clone())
                .map_err(|_| unusable!("{SCHEME} is {name}, expected iob1, iob2, bioes, io or none"))?,
        };
        Ok(Self { labels, scheme })
    }

    /// Finds the labels and their scheme in the training data. The base model's own labels are kept where it was trained
    /// for this task and they hold every tag.
    ///
    /// # Errors
    /// Unusable: tags that fit no scheme, with the tag and its line; fewer than two different ones.
    pub fn of_sentences(
        sentences: &[Sentence],
        path: &Path,
        fields: &Fields,
        config: &ModelConfig,
    ) -> Result<Self> {
        let place = || path.display().to_string();
        let asked = fields.tags.tag_scheme.unwrap_or(TagScheme::Auto);
        let lines: Vec<[usize; 1]> = sentences.iter().map(|sentence| [sentence.line]).collect();
        let tagged =
            sentences.iter().zip(&lines).map(|(sentence, line)| Tagged { tags: &sentence.tags, lines: line });
        let scheme = asked.resolve(tagged).with_context(place)?;
        let base = match config.has(Head::TokenClassification { labels: 0 }) {
            true => labels_of(config).context("config.json of the model to start from")?.unwrap_or_default(),
            false => Vec::new(),
        };
        let tags = || sentences.iter().flat_map(|sentence| &sentence.tags).map(String::as_str);
        if fields.tags.tag_scheme.is_none() && !base.is_empty() {
            // ids of the base's labels
            let known =
                Self { scheme: Scheme::of_labels(base.iter().map(String::as_str)), labels: base.clone() };
            let ids = known.ids();
            if tags().all(|tag| ids.contains_key(tag) && tag.parse::<u32>().is_ok()) {
                return Ok(known);
            }
        }
        Ok(Self { labels: labels::labels(tags(), base).with_context(place)?, scheme })
    }

    /// The ids of tags: by name; by number as well, where no label is an integer itself.
    fn ids(&self) -> BTreeMap<String, u32> {
        let names = self.labels.iter().cloned().zip(0..);
        if self.labels.iter().any(|label| label.parse::<i64>().is_ok()) {
            return names.collect();
        }
        (0..self.labels.len() as u32).map(|id| (id.to_string(), id)).chain(names).collect()
    }

    pub(super) fn head(&self) -> Head {
        Head::TokenClassification { labels: self.labels.len() }
    }

    pub(super) fn outputs(&self) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(self.labels.len())] }]
    }

    pub(super) fn write_config(&self, config: &mut ModelConfig) {
        write_labels(config, self.head(), &self.labels);
        config.raw.remove("problem_type");
        config.raw.insert(SCHEME.to_owned(), json!(self.scheme.name()));
    }

    /// The metric that decides which evaluation is the best: of entities where there are some, else of words.
    pub(super) fn deciding(&self) -> &'static str {
        if self.scheme == Scheme::None { "accuracy" } else { "f1" }
    }

    /// Sentences as examples: windows of at most `max_length` tokens, each of which predicts words of its own, so that
    /// nothing is cut. A word is learnt at its first token, or at all of them with `all_pieces`.
    ///
    /// # Errors
    /// Unusable: tags that the model does not have; the first of them are listed with file and line.
    pub fn examples(
        &self,
        sentences: &[Sentence],
        path: &Path,
        tokenizer: &Tokenizer,
        max_length: usize,
        all_pieces: bool,
    ) -> Result<Vec<Example>> {
        let ids = self.ids();
        let unknown = sentences.iter().filter_map(|sentence| {
            let tag = sentence.tags.iter().find(|tag| !ids.contains_key(*tag))?;
            Some((
                sentence.line,
                format!("tag \"{tag}\" is not one of the model's: {}", self.labels.join(", ")),
            ))
        });
        refuse(path, "tags that can't be used", unknown)?;
        let mut examples = Vec::new();
        for (i, sentence) in sentences.iter().enumerate() {
            let gold: Arc<[u32]> = sentence.tags.iter().map(|tag| ids[tag]).collect();
            let pieces = tokenizer
                .pieces_of_words(&sentence.tokens)
                .with_context(|| format!("{}:{}", path.display(), sentence.line))?;
            for window in Windowed::of(&pieces, |at| pieces.words[at], tokenizer, max_length)? {
                let (mut wanted, mut words) = (vec![None; window.encoding.len()], Vec::new());
                for (token, at) in window.predicts() {
                    let word = pieces.words[at];
                    if !pieces.continues[at] {
                        words.push((token, word));
                    }
                    if all_pieces || !pieces.continues[at] {
                        wanted[token] = Some(gold[word]);
                    }
                }
                let target = Target::Tags(Tags { sentence: i, gold: gold.clone(), wanted, words });
                examples.push(Example { encoding: window.encoding, target });
            }
        }
        Ok(examples)
    }

    /// Each token's label, where it is learnt. (T), of a whole packed batch.
    pub fn targets(targets: &[&Target]) -> Vec<Option<u32>> {
        let of =
            |target: &&Target| if let Target::Tags(tags) = target { tags.wanted.clone() } else { Vec::new() };
        targets.iter().flat_map(of).collect()
    }

    /// Entities and words as seqeval counts them, and the mean loss of the tokens that are learnt.
    ///
    /// # Errors
    /// A window has other rows than its tokens.
    pub fn measure(&self, outputs: &[Outputs], targets: &[&Target]) -> Result<Measured> {
        let mut sentences: BTreeMap<usize, (&[u32], Vec<Option<usize>>)> = BTreeMap::new();
        let (mut losses, mut count) = (0.0, 0);
        for (outputs, target) in outputs.iter().zip(targets) {
            let Target::Tags(tags) = target else { continue };
            let [logits] = &outputs[..] else { anyhow::bail!("the model gives {} outputs", outputs.len()) };
            let due = (tags.wanted.len(), self.labels.len());
            anyhow::ensure!(
                logits.dim() == due,
                "the model gives logits of {:?} where {due:?} are due",
                logits.dim()
            );
            for (row, wanted) in logits.rows().into_iter().zip(&tags.wanted) {
                if let Some(id) = wanted {
                    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
                    losses += sum.ln() - f64::from(row[*id as usize] - max);
                    count += 1;
                }
            }
            let (_, predicted) =
                sentences.entry(tags.sentence).or_insert_with(|| (&tags.gold, vec![None; tags.gold.len()]));
            for &(token, word) in &tags.words {
                predicted[word] = Some(argmax(&logits.row(token).to_vec()));
            }
        }
        let name = |id: usize| self.labels[id].as_str();
        let gold: Vec<Vec<&str>> =
            sentences.values().map(|(gold, _)| gold.iter().map(|&id| name(id as usize)).collect()).collect();
        let predicted: Vec<Vec<&str>> = sentences
            .values()
            .map(|(_, predicted)| predicted.iter().map(|id| id.map_or(OUTSIDE, name)).collect())
            .collect();
        let found = metrics::score(&gold, &predicted, self.scheme);
        let mut metrics = Metrics::from([
            ("accuracy".to_owned(), found.accuracy),
            ("loss".to_owned(), losses / count as f64),
        ]);
        if let Some(scores) = found.entities {
            metrics.extend([
                ("precision".to_owned(), scores.precision),
                ("recall".to_owned(), scores.recall),
                ("f1".to_owned(), scores.f1),
            ]);
        }
        let mut details = Map::from_iter([("per_type".to_owned(), json!(found.per_type))]);
        if let Some(strict) = found.strict {
            details.insert("strict".to_owned(), json!(strict));
        }
        Ok(Measured { metrics, details })
    }
}

/// A window of a text, between the tokens that the tokenizer puts around it.
struct Windowed {
    encoding: Encoding,
    /// The first of the text's tokens in it, and the tokens in front of that.
    first: usize,
    before: usize,
    predicted: std::ops::Range<usize>,
}

impl Windowed {
    /// The windows of a text; `word` tells what tokens belong together, by their places.
    fn of(
        pieces: &Pieces,
        word: impl Fn(usize) -> usize,
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Vec<Self>> {
        let (before, behind) = tokenizer.frame()?;
        let room = max_length.saturating_sub(before + behind);
        let mut lengths: Vec<usize> = Vec::new();
        for at in 0..pieces.ids.len() {
            match lengths.last_mut() {
                Some(length) if word(at) == word(at - 1) => *length += 1,
                _ => lengths.push(1),
            }
        }
        let framed = |tokens: std::ops::Range<usize>, predicted| {
            Ok(Self {
                encoding: tokenizer.framed(&pieces.ids[tokens.clone()])?,
                first: tokens.start,
                before,
                predicted,
            })
        };
        if lengths.is_empty() {
            return Ok(vec![framed(0..0, 0..0)?]);
        }
        let windows = windows(&lengths, room, room / SHARED)?;
        windows.into_iter().map(|window| framed(window.tokens, window.predicts)).collect()
    }

    /// The tokens that this window predicts: where each stands in it, and in the text.
    fn predicts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.predicted.clone().map(|at| (at - self.first + self.before, at))
    }
}

/// How entities are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct AnswerFlags {
    /// For token-classification, what entities are made of [default: first].
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Entities")]
    pub aggregation: Option<Aggregation>,
    /// What offsets count [default: char].
    #[arg(long, value_enum, value_name = "UNIT", help_heading = "Entities")]
    pub offset_unit: Option<OffsetUnit>,
    /// Answer with the label of every word, too.
    #[arg(long, help_heading = "Entities")]
    pub tags: bool,
}

impl AnswerFlags {
    /// The first flag that is set.
    pub fn first(&self) -> Option<&'static str> {
        [
            ("--aggregation", self.aggregation.is_some()),
            ("--offset-unit", self.offset_unit.is_some()),
            ("--tags", self.tags),
        ]
        .into_iter()
        .find_map(|(flag, is_set)| is_set.then_some(flag))
    }
}

/// A text whose entities are asked for.
pub struct Question {
    text: String,
    pieces: Pieces,
    /// How many words it has.
    count: usize,
    /// For each piece the window that predicts it, and its row there.
    places: Vec<(usize, usize)>,
}

/// Makes of a record the windows that a model is asked with: of `tokens`, or of a `text`.
///
/// # Errors
/// The record has neither, or what can't be tokenized.
pub fn question(
    row: &Row,
    columns: &Columns,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<(Vec<Encoding>, Question), BadRow> {
    let bad = |error: anyhow::Error| row.bad(format!("{error:#}"));
    let given = row.fields.contains_key(columns.of("tokens"));
    let (text, pieces, count) = if given {
        let words = row.words(columns, "tokens")?;
        let pieces = tokenizer.pieces_of_words(&words).map_err(bad)?;
        (words.join(" "), pieces, words.len())
    } else {
        let text = row.text(columns, "text")?.to_owned();
        let pieces = tokenizer.pieces(&text).map_err(bad)?;
        let count = pieces.words.last().map_or(0, |word| word + 1);
        (text, pieces, count)
    };
    // pieces that go on with a word stay with it in one window
    let mut groups: Vec<usize> = Vec::with_capacity(pieces.ids.len());
    for at in 0..pieces.ids.len() {
        let before = groups.last().copied();
        groups.push(match before {
            Some(group) if pieces.continues[at] => group,
            Some(group) => group + 1,
            None => 0,
        });
    }
    let windows = Windowed::of(&pieces, |at| groups[at], tokenizer, max_length).map_err(bad)?;
    let mut places = vec![(0, 0); pieces.ids.len()];
    for (i, window) in windows.iter().enumerate() {
        window.predicts().for_each(|(token, at)| places[at] = (i, token));
    }
    let encodings = windows.into_iter().map(|window| window.encoding).collect();
    Ok((encodings, Question { text, pieces, count, places }))
}

impl TokenClassification {
    /// The entities of a text as a record's fields, from the outputs of its windows.
    ///
    /// # Errors
    /// The outputs are not those of the windows. The inner error is the record's: logits that are not finite.
    pub fn answer(
        &self,
        question: &Question,
        outputs: &[Outputs],
        flags: &AnswerFlags,
    ) -> Result<Result<Map<String, Value>, String>> {
        let mut rows = Vec::with_capacity(question.places.len());
        for &(window, token) in &question.places {
            let logits =
                outputs.get(window).and_then(|outputs| outputs.first()).context("a window has no output")?;
            anyhow::ensure!(
                token < logits.nrows() && logits.ncols() == self.labels.len(),
                "the graph gives logits of {:?} for {} labels: export it again",
                logits.dim(),
                self.labels.len()
            );
            rows.push(logits.row(token).to_vec());
        }
        if let Some(row) = rows.iter().find(|row| row.iter().any(|x| !x.is_finite())) {
            return Ok(Err(format!("the model's logits are not finite: {row:?}")));
        }
        let Pieces { spans, words, continues, .. } = &question.pieces;
        let pieces: Vec<Piece> = (0..rows.len())
            .map(|i| Piece {
                span: spans[i].clone(),
                continues: continues[i],
                word: Some(words[i]),
                logits: &rows[i],
            })
            .collect();
        let aggregation = flags.aggregation.unwrap_or_default();
        let unit = flags.offset_unit.unwrap_or_default();
        let found = decode::entities(&question.text, &pieces, &self.labels, self.scheme, aggregation, unit);
        let entities: Vec<Value> = found
            .into_iter()
            .map(|found| {
                json!({
                    "entity": found.entity, "text": found.text, "start": found.start, "end": found.end,
                    "score": short(found.score),
                })
            })
            .collect();
        let mut answer = Map::from_iter([("entities".to_owned(), json!(entities))]);
        if flags.tags {
            let tags = decode::tags(&pieces, question.count, aggregation);
            let names = tags.into_iter().map(|id| id.map_or(OUTSIDE, |id| self.labels[id].as_str()));
            answer.insert("tags".to_owned(), names.collect());
        }
        Ok(Ok(answer))
    }
}
