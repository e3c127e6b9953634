//! Token classification: a label a word, and entities of words.

mod answer;
pub mod decode;
pub mod entities;
pub mod labels;
pub mod metrics;
mod reviewed;
pub mod scheme;
mod windowed;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use self::answer::{AnswerFlags, Question};
use self::scheme::{OUTSIDE, Scheme, TagScheme, Tagged};
use self::windowed::Windowed;
use super::distillation;
use super::flags::{LABEL_FLAGS, refuse_records};
use super::id2label::{self, default_names};
use super::review::{Review, Source};
use super::scores::{argmax, cross_entropy};
use super::weighting::{self, Weighting};
use super::{
    Answer, Asking, Beside, Dim, Distillation, Encoder, Example, Form, Learning, Look, Measured, Metric,
    Metrics, Objective, Output, Outputs, Start,
};
use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::{self, BadRow, Columns, Files, Format, How, Place, Row, TagColumn};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X};
use crate::model::{Head, ModelConfig};
use crate::{Result, bail_unusable, unusable};

/// The labels of words, and how they mark entities.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenClassification {
    /// In the order of `id2label`.
    pub labels: Vec<String>,
    pub scheme: Scheme,
    /// How much words count in the loss that is learnt.
    pub weighting: Weighting,
    /// How it learns from a teacher, if it has one.
    pub distillation: Option<Distillation>,
}

/// The key of config.json that keeps the scheme, which labels alone do not always tell.
const SCHEME: &str = "tag_scheme";

/// Flags of words and their tags.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct RecordFlags {
    /// For token-classification, the column of the words [default: tokens].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_column: Option<String>,
    /// For token-classification, the column of the words' tags [default: tags].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags_column: Option<String>,
    /// For .conll files, the column of the tags, by its number from 1 or its name [default: the last].
    #[arg(long, value_name = "COLUMN", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag_column: Option<TagColumn>,
    /// Count a word's label on all of its tokens, instead of on the first alone; behind a word's first, B- is I-.
    #[arg(long, help_heading = "Records")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub label_all_pieces: bool,
}

/// Flags of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrainingFlags {
    /// For token-classification, how tags mark entities [default: found in the training data].
    #[arg(long, value_enum, value_name = "SCHEME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag_scheme: Option<TagScheme>,
}

/// Words and what their tags are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    /// Where it begins.
    pub place: Place,
    /// The line of each word, where each stands on one of its own.
    pub lines: Vec<usize>,
    pub tokens: Vec<String>,
    pub tags: Vec<String>,
}

impl Sentence {
    /// The tags, and the lines that they stand on.
    fn tagged(&self) -> Tagged<'_> {
        Tagged { tags: &self.tags, place: self.place, lines: &self.lines }
    }
}

/// What a window of a sentence ought to give.
#[derive(Clone, Debug, PartialEq)]
pub struct Tags {
    /// Which of the sentences it is of.
    pub sentence: usize,
    /// The label ids of all words of the sentence.
    pub gold: Arc<[u32]>,
    /// (T): the label of each token that is learnt.
    pub wanted: Vec<Option<u32>>,
    /// The tokens that this window predicts words by, and which words they are the first of.
    pub words: Vec<(usize, usize)>,
    /// What a teacher has said of its tokens.
    pub taught: Option<Arc<[Taught]>>,
}

/// A token that a teacher has said something of, and its logits in the order of the labels.
pub type Taught = (usize, Box<[f32]>);

impl Tags {
    /// How many tokens are learnt.
    pub fn count(&self) -> usize {
        self.wanted.iter().flatten().count()
    }
}

impl Objective for TokenClassification {
    const NAME: &'static str = "token-classification";
    const PIPELINE_TAG: Option<&'static str> = Some(Self::NAME);
    const HEAD: Head = Head::TokenClassification { labels: 0 };
    const TEXTS_LEARNT: &'static [&'static str] = &[];
    const TEXTS_ASKED: &'static [&'static str] = &["text"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["entities", "tags"];
    const TRAINING_FLAGS: &'static [&'static str] = LABEL_FLAGS;
    const ANSWER_FLAGS: &'static [&'static str] = &["--offset-unit"];

    type Target = Tags;
    type Question = Question;

    /// Reads `id2label` of a fine-tuned model, and the scheme that tk has kept; else the one that the labels show.
    ///
    /// # Errors
    /// Labels that are inconsistent, or a scheme that tk does not know.
    fn from_config(config: &ModelConfig) -> Result<Self> {
        let labels = match id2label::read(config)? {
            Some(labels) => labels,
            None => default_names(2),
        };
        let scheme = match config.raw.get(SCHEME) {
            None | Some(Value::Null) => Scheme::of_labels(labels.iter().map(String::as_str)),
            Some(name) => serde_json::from_value(name.clone())
                .map_err(|_| unusable!("{SCHEME} is {name}, expected iob1, iob2, bioes, io or none"))?,
        };
        Ok(Self::new(labels, scheme))
    }

    fn write_config(&self, config: &mut ModelConfig) {
        id2label::write(config, self.head(), &self.labels);
        config.raw.remove("problem_type");
        config.raw.insert(SCHEME.to_owned(), json!(self.scheme.name()));
    }

    fn check_files(flags: &super::RecordFlags, files: &[&Path]) -> Result<()> {
        let is_conll = |path: &&Path| flags.reading.is(Format::Conll, path);
        if flags.token_classification.tag_column.is_some() && !files.iter().any(is_conll) {
            bail_unusable!("--tag-column is for .conll files; here is none");
        }
        Ok(())
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        let own = &flags.token_classification;
        let columns = Columns::default()
            .with("tokens", own.tokens_column.clone())
            .with("tags", own.tags_column.clone());
        (How { tag_column: own.tag_column.clone(), ..flags.reading.how() }, columns)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Tags>> {
        let all_pieces = start.records.token_classification.label_all_pieces;
        let distillation = Distillation::asked(&start.training.shared)?;
        if distillation.is_some() && all_pieces {
            bail_unusable!(
                "--label-all-pieces and --teacher exclude each other: a teacher of another tokenizer says something of \
                 words, not of their pieces"
            );
        }
        let tokenizer = start.tokenizer()?.for_words()?;
        let sentences = read(start.train, start.records)?;
        let asked = start.training.token_classification.tag_scheme;
        let task = Self::of_sentences(&sentences, start.train, asked, &start.config)?;
        let mut examples =
            task.examples_of(&sentences, start.train, &tokenizer, start.max_length, all_pieces)?;
        keep_learnt(&mut examples);
        if examples.is_empty() {
            bail_unusable!("{}: no word has a token that could be learnt", start.train);
        }
        let weighting = Weighting::new(&start.training.shared, &task.labels, || {
            let mut counts = vec![0; task.labels.len()];
            for Tags { words, gold, .. } in examples.iter().map(|example| &example.target) {
                words.iter().for_each(|&(_, word)| counts[gold[word] as usize] += 1);
            }
            weighting::balanced(&counts)
        })?;
        let task = Self { weighting, distillation, ..task };
        Ok(Learning { task, tokenizer, examples, files: Vec::new() })
    }

    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Tags>>> {
        let Encoder { records, tokenizer, max_length, .. } = *encoder;
        let all_pieces = records.token_classification.label_all_pieces;
        self.examples_of(&read(files, records)?, files, tokenizer, max_length, all_pieces)
    }

    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Tags>>> {
        let mut examples = self.examples(files, encoder)?;
        keep_learnt(&mut examples);
        Ok(examples)
    }

    fn check_learnt(&self, files: &Files, flags: &super::RecordFlags) -> Result<()> {
        self.refuse_unknown(&read(files, flags)?, files)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        let look = |sentence: Sentence| {
            let texts = vec![(sentence.tokens.join(" "), None)];
            Look { place: sentence.place, texts, labels: sentence.tags }
        };
        Ok(read(files, flags)?.into_iter().map(look).collect())
    }

    fn beside(&self, target: &Tags, _: &Tokenizer) -> Beside {
        let name = |id: u32| self.labels[id as usize].clone();
        Beside::Tokens(target.wanted.iter().map(|wanted| wanted.map(name)).collect())
    }

    fn summary(&self) -> Option<String> {
        let weighting = self.weighting.told(&self.labels).map(|told| format!("; {told}"));
        let labels = id2label::told(&self.labels);
        Some(format!("tags ({}): {labels}{}", self.scheme.name(), weighting.unwrap_or_default()))
    }

    fn keeps(&self, base: &Self) -> bool {
        self.labels == base.labels
    }

    fn losses(target: &Tags) -> Vec<usize> {
        vec![target.count()]
    }

    fn weights(&self, target: &Tags) -> Vec<f64> {
        let of_labels = target.wanted.iter().flatten().map(|&id| self.weighting.of(id)).sum();
        // a teacher's rows count alike
        [of_labels].into_iter().chain(self.distillation.map(|_| target.count() as f64)).collect()
    }

    fn loss_names(&self) -> &'static [&'static str] {
        if self.distillation.is_some() { Distillation::LOSSES } else { Self::LOSSES }
    }

    fn distillation(&self) -> Option<Distillation> {
        self.distillation
    }

    fn places_in(&self, teacher: &Self) -> Result<Vec<usize>> {
        distillation::places(&self.labels, &teacher.labels)
    }

    /// The rows of the words' first tokens.
    fn said(&self, outputs: &Outputs, target: &Tags) -> Result<Vec<f32>> {
        let [logits] = &outputs[..] else { anyhow::bail!("the model gives {} outputs", outputs.len()) };
        self.check_rows(logits.dim(), target)?;
        Ok(target.words.iter().flat_map(|&(token, _)| logits.row(token).to_vec()).collect())
    }

    fn teach(&self, targets: Vec<&mut Tags>, teacher: &Self, said: &[(&Tags, &[f32])]) -> Result<usize> {
        let places = self.places_in(teacher)?;
        let mut words = BTreeMap::new();
        for (tags, said) in said {
            let rows = said.chunks_exact(places.len());
            anyhow::ensure!(rows.len() == tags.words.len(), "what was said is not a row a word");
            words.extend(tags.words.iter().zip(rows).map(|(&(_, word), row)| ((tags.sentence, word), row)));
        }
        let mut untaught = 0;
        for target in targets {
            let own = |&(token, word): &(usize, usize)| {
                let row = words.get(&(target.sentence, word))?;
                Some((token, places.iter().map(|&at| row[at]).collect()))
            };
            let taught: Arc<[Taught]> = target.words.iter().filter_map(own).collect();
            untaught += target.words.len() - taught.len();
            target.taught = Some(taught);
        }
        Ok(untaught)
    }

    fn class_weights(&self) -> Vec<(&str, f32)> {
        self.weighting.by_label(&self.labels)
    }

    fn head(&self) -> Head {
        Head::TokenClassification { labels: self.labels.len() }
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(self.labels.len())] }]
    }

    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Tags)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let wanted: Vec<Option<u32>> =
            examples.iter().flat_map(|(_, tags)| tags.wanted.iter().copied()).collect();
        let scores = outputs.first().context("the model has no output")?;
        if self.distillation.is_some() || !self.weighting.is_plain() {
            let scores = scores.tensor()?.to_dtype(DType::F32)?;
            let of_labels = || -> Result<Tensor> {
                Ok((self.weighting.of_rows(&scores, &wanted, label_smoothing)? / of[0])?)
            };
            let Some(distillation) = self.distillation else { return Ok(vec![of_labels()?]) };
            let sum = distillation.of_rows(&scores, &taught(examples))?;
            return distillation.terms(of_labels, &(sum / of[1])?);
        }
        Ok(vec![eager.cross_entropy(scores, &wanted, label_smoothing as f32, 1.0 / of[0] as f32)?])
    }

    /// Of entities where there are some, else of words.
    fn metrics(&self) -> &'static [Metric] {
        const ACCURACY: Metric = Metric::rising("accuracy");
        match self.scheme {
            Scheme::None => const { &[ACCURACY] },
            _ => {
                const { &[Metric::rising("f1"), Metric::rising("precision"), Metric::rising("recall"), ACCURACY] }
            }
        }
    }

    /// Entities and words as seqeval counts them, and the mean loss of the tokens that are learnt.
    ///
    /// # Errors
    /// A window has other rows than its tokens.
    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Tags]) -> Result<Measured> {
        Ok(self.measure_sentences(&self.predictions(outputs, targets)?))
    }

    fn review(
        &self,
        model: &Forward,
        examples: &[(&Encoding, &Tags)],
        of: Source,
    ) -> Result<(Measured, Review)> {
        let (encodings, targets): (Vec<_>, Vec<_>) = examples.iter().copied().unzip();
        let predictions = self.predictions(&model.outputs(&encodings)?, &targets)?;
        Ok((self.measure_sentences(&predictions), self.reviewed(&predictions, of)?))
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns().with("tokens", flags.token_classification.tokens_column.clone())
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
        answer::question(row, asking)
    }

    fn answer(&self, question: &Question, outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        self.entities(question, outputs, &asking.flags)
    }
}

/// Reads every sentence.
///
/// # Errors
/// Unusable: the file can't be read, has no sentences, or has some without words or without a tag a word; the first of
/// them are listed with file and line.
fn read(files: &Files, flags: &super::RecordFlags) -> Result<Vec<Sentence>> {
    let (how, columns) = TokenClassification::reading(flags);
    records::read_examples(files, &how, |row| {
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
        Ok(Sentence { place: row.place(), lines: row.lines, tokens, tags })
    })
}

/// Leaves out windows without a word to learn.
fn keep_learnt(examples: &mut Vec<Example<Tags>>) {
    examples.retain(|example| example.target.count() > 0);
}

/// What was predicted of a sentence.
struct Predicted<'a> {
    /// The label ids of its words.
    gold: &'a [u32],
    /// Those that were predicted; none of a word without tokens.
    words: Vec<Option<usize>>,
    /// The sum over the tokens that are learnt, and how many these are.
    loss: f64,
    count: usize,
}

/// What a teacher has said of each token of a batch.
fn taught<'t>(examples: &[(&Encoding, &'t Tags)]) -> Vec<Option<&'t [f32]>> {
    let mut rows = Vec::new();
    for (_, tags) in examples {
        let start = rows.len();
        rows.resize(start + tags.wanted.len(), None);
        for (token, logits) in tags.taught.iter().flat_map(|taught| taught.iter()) {
            rows[start + token] = Some(&logits[..]);
        }
    }
    rows
}

impl TokenClassification {
    /// With labels that all count alike, and no teacher.
    pub fn new(labels: Vec<String>, scheme: Scheme) -> Self {
        Self { labels, scheme, weighting: Weighting::default(), distillation: None }
    }

    /// What was predicted of each sentence, by its place in the file.
    ///
    /// # Errors
    /// A window has other rows than its tokens.
    fn predictions<'t>(
        &self,
        outputs: &[Outputs],
        targets: &[&'t Tags],
    ) -> Result<BTreeMap<usize, Predicted<'t>>> {
        let mut sentences = BTreeMap::new();
        for (outputs, tags) in outputs.iter().zip(targets) {
            let [logits] = &outputs[..] else { anyhow::bail!("the model gives {} outputs", outputs.len()) };
            self.check_rows(logits.dim(), tags)?;
            let sentence = sentences.entry(tags.sentence).or_insert_with(|| Predicted {
                gold: &tags.gold,
                words: vec![None; tags.gold.len()],
                loss: 0.0,
                count: 0,
            });
            for (row, wanted) in logits.rows().into_iter().zip(&tags.wanted) {
                if let Some(id) = wanted {
                    sentence.loss += cross_entropy(&row.to_vec(), *id as usize);
                    sentence.count += 1;
                }
            }
            for &(token, word) in &tags.words {
                sentence.words[word] = Some(argmax(&logits.row(token).to_vec()));
            }
        }
        Ok(sentences)
    }

    /// Whether a window's logits are a row a token.
    fn check_rows(&self, found: (usize, usize), tags: &Tags) -> Result<()> {
        let due = (tags.wanted.len(), self.labels.len());
        anyhow::ensure!(found == due, "the model gives logits of {found:?} where {due:?} are due");
        Ok(())
    }

    /// The wanted and the predicted tags of a sentence.
    fn tags<'a>(&'a self, sentence: &Predicted) -> (Vec<&'a str>, Vec<&'a str>) {
        let name = |id: usize| self.labels[id].as_str();
        let gold = sentence.gold.iter().map(|&id| name(id as usize)).collect();
        (gold, sentence.words.iter().map(|id| id.map_or(OUTSIDE, name)).collect())
    }

    fn measure_sentences(&self, sentences: &BTreeMap<usize, Predicted>) -> Measured {
        let (gold, predicted): (Vec<Vec<&str>>, Vec<Vec<&str>>) =
            sentences.values().map(|sentence| self.tags(sentence)).unzip();
        let found = metrics::score(&gold, &predicted, self.scheme);
        let losses: f64 = sentences.values().map(|sentence| sentence.loss).sum();
        let count: usize = sentences.values().map(|sentence| sentence.count).sum();
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
        Measured { metrics, details }
    }

    /// Finds the labels and their scheme in the training data. The base model's own labels are kept where it was trained
    /// for this task and they hold every tag.
    ///
    /// # Errors
    /// Unusable: tags that fit no scheme, with the tag and its line; fewer than two different ones.
    fn of_sentences(
        sentences: &[Sentence],
        files: &Files,
        asked: Option<TagScheme>,
        config: &ModelConfig,
    ) -> Result<Self> {
        let place = || files.to_string();
        let tagged = sentences.iter().map(Sentence::tagged);
        let scheme = asked.unwrap_or(TagScheme::Auto).resolve(tagged, files).with_context(place)?;
        let base = match config.has(Head::TokenClassification { labels: 0 }) {
            true => {
                id2label::read(config).context("config.json of the model to start from")?.unwrap_or_default()
            }
            false => Vec::new(),
        };
        let tags = || sentences.iter().flat_map(|sentence| &sentence.tags).map(String::as_str);
        if asked.is_none() && !base.is_empty() {
            // ids of the base's labels
            let known = Self::new(base.clone(), Scheme::of_labels(base.iter().map(String::as_str)));
            let ids = known.ids();
            if tags().all(|tag| ids.contains_key(tag) && tag.parse::<u32>().is_ok()) {
                return Ok(known);
            }
        }
        let labels = labels::labels(tags(), base).with_context(place)?;
        Ok(Self::new(labels, scheme))
    }

    /// The ids of tags: by name; by number as well, where no label is an integer itself.
    fn ids(&self) -> BTreeMap<String, u32> {
        let names = self.labels.iter().cloned().zip(0..);
        if self.labels.iter().any(|label| label.parse::<i64>().is_ok()) {
            return names.collect();
        }
        (0..self.labels.len() as u32).map(|id| (id.to_string(), id)).chain(names).collect()
    }

    /// Refuses tags that the model does not have; the first of them are listed with file and line.
    fn refuse_unknown(&self, sentences: &[Sentence], files: &Files) -> Result<()> {
        let ids = self.ids();
        let unknown = sentences.iter().filter_map(|sentence| {
            let at = sentence.tags.iter().position(|tag| !ids.contains_key(tag))?;
            let (tag, place) = (&sentence.tags[at], sentence.tagged().place(at));
            Some((
                place,
                format!("tag \"{tag}\" is not one of the model's: {}", id2label::told(&self.labels)),
            ))
        });
        refuse_records(files, "tags that can't be used", unknown)
    }

    /// Sentences as examples: windows of at most `max_length` tokens, each of which predicts words of its own, so that
    /// nothing is cut. A word is learnt at its first token, or at all of them with `all_pieces`: the later ones have the
    /// label that is [inside](labels::inside) its entity.
    ///
    /// # Errors
    /// Unusable: tags that the model does not have; the first of them are listed with file and line.
    fn examples_of(
        &self,
        sentences: &[Sentence],
        files: &Files,
        tokenizer: &Tokenizer,
        max_length: usize,
        all_pieces: bool,
    ) -> Result<Vec<Example<Tags>>> {
        self.refuse_unknown(sentences, files)?;
        let ids = self.ids();
        let inside = labels::inside(&self.labels);
        let windows = |sentence: &Sentence| {
            let pieces =
                tokenizer.pieces_of_words(&sentence.tokens).with_context(|| files.at(sentence.place))?;
            let windows = Windowed::of(&pieces, |at| pieces.words[at], tokenizer, max_length)?;
            anyhow::Ok((pieces, windows))
        };
        let mut examples = Vec::new();
        let of = format!("{} {max_length}", Self::NAME);
        let own = |sentence: &Sentence, key: &mut Key| {
            sentence.tokens.iter().for_each(|token| key.add(Some(token)));
            key.add(None);
        };
        tokenizer.in_order(&of, sentences, own, windows, |i, windowed| {
            let (pieces, windows) = windowed?;
            let gold: Arc<[u32]> = sentences[i].tags.iter().map(|tag| ids[tag]).collect();
            for window in windows {
                let (mut wanted, mut words) = (vec![None; window.encoding.len()], Vec::new());
                for (token, at) in window.predicts() {
                    let word = pieces.words[at];
                    if !pieces.continues[at] {
                        words.push((token, word));
                        wanted[token] = Some(gold[word]);
                    } else if all_pieces {
                        wanted[token] = Some(inside[gold[word] as usize]);
                    }
                }
                let target = Tags { sentence: i, gold: gold.clone(), wanted, words, taught: None };
                examples.push(Example { encoding: window.encoding, target });
            }
            Ok(())
        })?;
        Ok(examples)
    }
}
