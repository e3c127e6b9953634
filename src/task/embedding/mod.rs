//! Embeddings of sentences: a text → numbers that are near those of texts with a like meaning. Trained on pairs of texts
//! that belong together, or on pairs with a score; read and written as `sentence-transformers` has them.

pub mod files;
mod loss;
mod metrics;
mod records;
#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::Context;
use candle_core::{Device, Tensor};
use ndarray::{Array2, ArrayView1, Axis};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::files::{PoolBy, Prompts};
pub use self::loss::{Regime, ScoredLoss};
use self::records::{Kind, Record, read};
pub use self::records::{PromptFlags, RecordFlags};
use super::flags::refuse_records;
use super::scores::{short, to_length_one};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Objective, Output,
    Outputs, Start, TextColumns,
};
use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X};
use crate::model::ops::Ops;
use crate::model::{Family, Head, ModelConfig};
use crate::{Result, bail_unusable};

/// How texts become embeddings, and what is learnt of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// The width of the hidden states, and of an embedding.
    pub channels: usize,
    pub pooling: PoolBy,
    /// Whether embeddings have length 1.
    pub normalized: bool,
    /// Whether a prompt's tokens are pooled as all others are.
    pools_prompts: bool,
    /// The longest text that the model was trained with, where its files say so.
    max_length: Option<usize>,
    /// Whether texts are made lower-case in front of the tokenizer.
    lower_case: bool,
    pub prompts: Prompts,
    /// What else `config_sentence_transformers.json` says.
    about: Map<String, Value>,
    pub regime: Regime,
    /// Examples of a chunk, where activations are held for one at a time.
    pub chunk: Option<usize>,
    /// What is learnt from, where something is.
    kind: Option<Kind>,
}

/// What stands behind a record's first text.
#[derive(Clone, Debug, PartialEq)]
pub struct Related {
    /// The other of a pair; or the text that belongs to the first, and one that does not where there is one.
    pub others: Vec<Encoding>,
    /// How like a pair's texts are.
    pub score: Option<f32>,
}

/// Flags of training.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrainingFlags {
    /// For embedding, how the tokens of a text become one row [default: as the model's 1_Pooling/config.json says, or the
    /// mean].
    #[arg(long, value_enum, help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<PoolBy>,
    /// Give embeddings the length 1, as the model's modules.json may say already.
    #[arg(long, help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub normalize: bool,
    /// What is learnt of pairs with a score [default: cosent].
    #[arg(long, value_enum, help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_loss: Option<ScoredLoss>,
    /// Where a batch's other texts are the negatives, what similarities are divided by [default: 0.05].
    #[arg(long, value_name = "X", help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Widths, such as 384,256,128: each of so many first channels learns to be an embedding of its own, and their losses are
    /// added up.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matryoshka_dims: Option<Vec<usize>>,
    /// Hold the activations of so many examples at a time, and compute them twice: a batch of any size fits in memory, and
    /// its loss is over all of it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached_chunk: Option<u32>,
}

/// Flags of answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct AnswerFlags {
    #[command(flatten)]
    #[serde(flatten)]
    pub prompts: PromptFlags,
    /// For embedding, give the first N numbers alone, of length 1 again where the model's have that; for models that were
    /// trained with --matryoshka-dims.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Embeddings")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
}

/// Examples whose loss is measured together, in the order of the file.
const MEASURED: usize = 32;

impl Objective for Embedding {
    const NAME: &'static str = "embedding";
    const PIPELINE_TAG: Option<&'static str> = Some("sentence-similarity");
    const HEAD: Head = Head::Embedding { wanted: None };
    const MARK: Option<&'static str> = Some(files::MODULES);
    const TEXTS_LEARNT: &'static [&'static str] = &[];
    const TEXTS_ASKED: &'static [&'static str] = &["text", "text_pair"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["embedding", "similarity"];
    const FILES: &'static [&'static str] =
        &[files::MODULES, files::POOLING, files::TRANSFORMER, files::MODEL];
    /// Hidden states, which other programs read.
    const AHEAD: usize = 1;

    type Target = Related;
    /// The windows are all.
    type Question = ();

    /// What a directory says that has no files of `sentence-transformers`: the mean of all tokens.
    fn from_config(config: &ModelConfig) -> Result<Self> {
        Ok(Self::new(config.family.limits().channels))
    }

    fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        if config.family.class(Self::HEAD).is_none() {
            // the family says why
            crate::model::manifest::manifest(|o| config.family.define(o, Self::HEAD).map(drop))?;
        }
        if dir.join(files::MODULES).exists() {
            files::read(dir, config.family.limits().channels)
        } else {
            Self::from_config(config)
        }
    }

    fn write_config(&self, config: &mut ModelConfig) {
        let class = config.family.class(self.head());
        let raw = &mut config.raw;
        raw.insert("architectures".to_owned(), json!([class]));
        for key in ["id2label", "label2id", "num_labels", "problem_type"] {
            raw.remove(key);
        }
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        let own = &flags.embedding;
        let columns = Columns::default()
            .with("anchor", own.anchor_column.clone())
            .with("positive", own.positive_column.clone())
            .with("negative", own.negative_column.clone())
            .with("sentence1", own.sentence1_column.clone())
            .with("sentence2", own.sentence2_column.clone())
            .with("score", own.score_column.clone());
        (flags.reading.how(), columns)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Related>> {
        let flags = &start.training.embedding;
        let mut task = Self::open(start.model, &start.config)?;
        task.pooling = flags.pooling.unwrap_or(task.pooling);
        task.normalized |= flags.normalize;
        task.max_length = Some(start.max_length);
        task.chunk = flags.cached_chunk.map(|n| n as usize);
        task.regime = task.checked_regime(flags)?;
        let tokenizer = start.tokenizer()?;
        let records = read(start.train, start.records)?;
        task.kind = records.first().map(Record::kind);
        task.check_regime_of_kind(flags)?;
        let encoder = Encoder {
            records: start.records,
            training: start.training,
            tokenizer: &tokenizer,
            max_length: start.max_length,
        };
        let examples = task.encode(records, start.train, &encoder)?;
        let files = files::write(&task)?;
        Ok(Learning { task, tokenizer, examples, files })
    }

    fn check_learnt(&self, files: &Files, flags: &super::RecordFlags) -> Result<()> {
        self.refuse_unfit(&read(files, flags)?, files)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        let look = |record: records::Record| {
            let texts = record.texts.into_iter().map(|text| (text, None)).collect();
            Look { place: record.place, texts, labels: Vec::new() }
        };
        Ok(records::read(files, flags)?.into_iter().map(look).collect())
    }

    fn beside(&self, target: &Related, tokenizer: &Tokenizer) -> Beside {
        let text = |encoding: &Encoding| tokenizer.inner().decode(&encoding.ids, true).unwrap_or_default();
        Beside::Example(match (target.score, &target.others[..]) {
            (Some(score), [other]) => format!("{score} like {:?}", text(other)),
            (_, [near]) => format!("near {:?}", text(near)),
            (_, [near, far, ..]) => format!("near {:?}, far from {:?}", text(near), text(far)),
            (_, []) => String::new(),
        })
    }

    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Related>>> {
        self.encode(read(files, encoder.records)?, files, encoder)
    }

    fn others(target: &Related) -> &[Encoding] {
        &target.others
    }

    fn summary(&self) -> Option<String> {
        let what = match self.kind? {
            Kind::Scored => "pairs with a score",
            Kind::Ranked => "texts and what belongs to them",
        };
        let length = if self.normalized { ", of length 1" } else { "" };
        Some(format!("{what}; pooled by {:?}{length}", self.pooling))
    }

    fn smooths_labels(&self) -> bool {
        false
    }

    fn chunk(&self) -> Option<usize> {
        self.chunk
    }

    fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    fn head(&self) -> Head {
        Head::Embedding { wanted: None }
    }

    fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        let mut outputs = family.define(o, self.head())?;
        let hidden = outputs.first().context("the model has no hidden states")?;
        let pooled = match self.pooling.verb() {
            Ok(which) => o.pick(hidden, which)?,
            Err(how) => o.pool(hidden, how)?,
        };
        outputs.push(if self.normalized { o.normalize(&pooled)? } else { pooled });
        Ok(outputs)
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        let channels = Dim::Of(self.channels);
        vec![
            Output { name: "last_hidden_state", dims: vec![Dim::Batch, Dim::Sequence, channels] },
            Output { name: "sentence_embedding", dims: vec![Dim::Batch, channels] },
        ]
    }

    fn loss(
        &self,
        _: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Related)],
        _: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let rows = outputs.last().context("the model has no output")?.tensor()?;
        let examples: Vec<&Related> = examples.iter().map(|(_, related)| *related).collect();
        Ok(vec![(self.regime.sum(&rows, &examples)? / of[0])?])
    }

    fn metrics(&self) -> &'static [Metric] {
        const SPEARMAN: Metric = Metric::rising("spearman");
        const RANKED: [Metric; 3] =
            [Metric::rising("recall@1"), Metric::rising("recall@10"), Metric::rising("mrr")];
        match self.kind {
            Some(Kind::Scored) => const { &[SPEARMAN] },
            Some(Kind::Ranked) => const { &RANKED },
            None => const { &[SPEARMAN, RANKED[0], RANKED[1], RANKED[2]] },
        }
    }

    fn measure_examples(&self, outputs: &[Outputs], examples: &[(&Encoding, &Related)]) -> Result<Measured> {
        let due: usize = examples.iter().map(|(_, related)| 1 + related.others.len()).sum();
        anyhow::ensure!(outputs.len() == due, "{} embeddings of {due} texts", outputs.len());
        let mut rows = Vec::with_capacity(due * self.channels);
        for outputs in outputs {
            rows.extend(self.embedding(outputs)?);
        }
        let rows = Array2::from_shape_vec((due, self.channels), rows)?;
        let scores: Vec<f32> = examples.iter().filter_map(|(_, related)| related.score).collect();
        let mut metrics = if scores.is_empty() {
            metrics::retrieval(&rows, examples)
        } else {
            let pairs = rows.axis_chunks_iter(Axis(0), 2);
            let cosines: Vec<f64> = pairs.map(|pair| metrics::cosine(pair.row(0), pair.row(1))).collect();
            metrics::scored(&cosines, &scores)
        };
        metrics.insert("loss".to_owned(), self.mean_loss(&rows, examples)?);
        Ok(metrics.into())
    }

    fn measure(&self, model: &Forward, examples: &[(&Encoding, &Related)]) -> Result<Measured> {
        let texts = examples.iter().flat_map(|&(first, related)| [first].into_iter().chain(&related.others));
        self.measure_examples(&model.answering(&texts.collect::<Vec<_>>())?, examples)
    }

    /// The cosine of the two embeddings.
    fn agreement(&self, wanted: &Outputs, found: &Outputs) -> f64 {
        match (self.embedding(wanted), self.embedding(found)) {
            (Ok(wanted), Ok(found)) => {
                let (wanted, found): (Vec<f32>, Vec<f32>) = (wanted.collect(), found.collect());
                metrics::cosine(ArrayView1::from(&wanted), ArrayView1::from(&found))
            }
            _ => 0.0,
        }
    }

    fn measure_outputs(&self, _: &[Outputs], _: &[&Related]) -> Result<Measured> {
        anyhow::bail!("embeddings are measured with the texts that they are of")
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns()
    }

    fn row_width(&self, flags: &super::AnswerFlags) -> Option<usize> {
        Some(flags.embedding.dimensions.map_or(self.channels, |width| width as usize))
    }

    fn check_room(&self, asking: &Asking) -> Result<()> {
        self.prompts_of(&asking.flags.embedding.prompts)?;
        if let Some(width) = asking.flags.embedding.dimensions.filter(|&width| width as usize > self.channels)
        {
            bail_unusable!("--dimensions {width}: the model's embeddings have {}", self.channels);
        }
        asking.tokenizer.encode("", None, asking.max_length).map(drop)
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, ()), BadRow> {
        let bad = |error: anyhow::Error| row.bad(format!("{error:#}"));
        let prompts = self.prompts_of(&asking.flags.embedding.prompts).map_err(bad)?;
        let (text, pair) = TextColumns::read(&asking.columns, row)?;
        let texts = [Some((text, prompts.0)), pair.map(|pair| (pair, prompts.1))];
        let encode = |(text, prompt): (String, &str)| {
            let encoding = asking.tokenizer.encode(&self.text(&text, prompt), None, asking.max_length);
            let encoding = encoding.map_err(bad)?;
            if encoding.is_empty() { Err(row.bad("the text has no tokens")) } else { Ok(encoding) }
        };
        Ok((texts.into_iter().flatten().map(encode).collect::<Result<_, _>>()?, ()))
    }

    /// A text's embedding; of two texts, how like they are.
    fn answer(&self, (): &(), outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        let width = self.row_width(&asking.flags).unwrap_or(self.channels);
        let rows =
            outputs.iter().map(|outputs| self.shortened(outputs, width)).collect::<Result<Vec<_>>>()?;
        if let Some(bad) = rows.iter().flatten().find(|x| !x.is_finite()) {
            return Ok(Err(format!("the model's embedding is not finite: {bad}")));
        }
        let field = match &rows[..] {
            [row] => ("embedding", row.iter().map(|&x| short(x)).collect()),
            [first, second] => {
                let cosine = metrics::cosine(ArrayView1::from(first), ArrayView1::from(second));
                ("similarity", short(cosine as f32))
            }
            others => anyhow::bail!("{} embeddings of a record", others.len()),
        };
        Ok(Ok(Map::from_iter([(field.0.to_owned(), field.1)])))
    }
}

impl Embedding {
    /// The mean of all tokens of a model that says nothing else.
    pub fn new(channels: usize) -> Self {
        Self {
            channels,
            pooling: PoolBy::Mean,
            normalized: false,
            pools_prompts: true,
            max_length: None,
            lower_case: false,
            prompts: Prompts::default(),
            about: Map::new(),
            regime: Regime::default(),
            chunk: None,
            kind: None,
        }
    }

    /// A text as it is tokenized: behind its prompt, without white space around, as `sentence-transformers` has it.
    fn text(&self, text: &str, prompt: &str) -> String {
        let whole = format!("{prompt}{text}");
        // what Python strips: Unicode's white space, and the separators of ASCII
        let stripped = whole.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c));
        if self.lower_case { stripped.to_lowercase() } else { stripped.to_owned() }
    }

    /// The prompts in front of first texts and in front of the others.
    ///
    /// # Errors
    /// Unusable: there is none of this name, or the model's prompts are not to be pooled.
    fn prompts_of(&self, flags: &PromptFlags) -> Result<(&str, &str)> {
        let named = |flag: &str, name: &Option<String>| {
            self.prompts.named(name.as_deref()).map_err(|error| match name {
                Some(name) => error.context(format!("--{flag} {name}")),
                None => error,
            })
        };
        let both = (
            named("prompt-name", &flags.prompt_name)?,
            named("document-prompt-name", &flags.document_prompt_name)?,
        );
        if !self.pools_prompts && [both.0, both.1].iter().any(|prompt| !prompt.is_empty()) {
            bail_unusable!(
                "{}: include_prompt is false, and tk pools the tokens of prompts as it does all others: ask for none",
                files::POOLING
            );
        }
        Ok(both)
    }

    /// What the flags ask for.
    ///
    /// # Errors
    /// Unusable: names the flag.
    fn checked_regime(&self, flags: &TrainingFlags) -> Result<Regime> {
        let dims = flags.matryoshka_dims.clone().unwrap_or_default();
        if let Some(wrong) = dims.iter().find(|&&dim| dim == 0 || dim > self.channels) {
            bail_unusable!(
                "--matryoshka-dims {wrong}: expected widths from 1 to the model's {}",
                self.channels
            );
        }
        let temperature = flags.temperature.unwrap_or(Regime::default().temperature);
        if !(temperature > 0.0 && temperature.is_finite()) {
            bail_unusable!("--temperature {temperature}: expected a number above 0");
        }
        Ok(Regime { scored: flags.embedding_loss.unwrap_or_default(), temperature, dims })
    }

    /// Refuses what says nothing to records of this kind.
    ///
    /// # Errors
    /// Unusable: names the flag.
    fn check_regime_of_kind(&self, flags: &TrainingFlags) -> Result<()> {
        match self.kind {
            Some(Kind::Ranked) if flags.embedding_loss.is_some() => {
                bail_unusable!(
                    "--embedding-loss is for pairs with a score; these records have anchors and positives"
                )
            }
            Some(Kind::Scored) if flags.temperature.is_some() => {
                bail_unusable!(
                    "--temperature is for anchors and positives; these records are pairs with a score"
                )
            }
            _ => Ok(()),
        }
    }

    /// Refuses records of another kind than the first, and scores that the loss can't take.
    fn refuse_unfit(&self, records: &[Record], files: &Files) -> Result<()> {
        let kind = self.kind.or(records.first().map(Record::kind));
        let other_kind = records.iter().filter(|record| Some(record.kind()) != kind);
        let why = match kind {
            Some(Kind::Scored) => "anchor and positive, where the others are pairs with a score",
            _ => "a pair with a score, where the others have anchor and positive",
        };
        let place = |record: &Record, why: &str| (record.place, why.to_owned());
        refuse_records(files, "records of two kinds", other_kind.map(|record| place(record, why)))?;
        if self.regime.scored == ScoredLoss::Cosine {
            let wide = records.iter().filter_map(|record| Some((record.place, record.score?)));
            let wide = wide.filter(|(_, score)| !(-1.0..=1.0).contains(score));
            let why = "a cosine is from -1 to 1: --max-score divides by the highest score";
            refuse_records(
                files,
                "scores that no cosine is",
                wide.map(|(place, score)| (place, format!("the score is {score}; {why}"))),
            )?;
        }
        Ok(())
    }

    /// Encodes records.
    ///
    /// # Errors
    /// Unusable: records of another kind than the first, scores that the loss can't take, texts without tokens; the
    /// first of them are listed with file and line.
    fn encode(
        &self,
        records: Vec<Record>,
        files: &Files,
        encoder: &Encoder,
    ) -> Result<Vec<Example<Related>>> {
        let prompts = self.prompts_of(&encoder.records.embedding.prompts)?;
        self.refuse_unfit(&records, files)?;
        let kind = self.kind.or(records.first().map(Record::kind));
        let document = if kind == Some(Kind::Scored) { prompts.0 } else { prompts.1 };
        let mut texts: Vec<String> = Vec::with_capacity(2 * records.len());
        let mut places = Vec::with_capacity(texts.capacity());
        for record in &records {
            for (i, text) in record.texts.iter().enumerate() {
                texts.push(self.text(text, if i == 0 { prompts.0 } else { document }));
                places.push(record.place);
            }
        }
        let (tokenizer, max_length) = (encoder.tokenizer, encoder.max_length);
        let mut encodings = Vec::with_capacity(texts.len());
        let own = |text: &String, key: &mut Key| key.add(Some(text));
        let encode = |text: &String| tokenizer.encode(text, None, max_length);
        tokenizer.in_order(&format!("{} {max_length}", Self::NAME), &texts, own, encode, |i, encoding| {
            encodings.push(encoding.with_context(|| files.at(places[i]))?);
            Ok(())
        })?;
        let empty = encodings.iter().zip(&places).filter(|(encoding, _)| encoding.is_empty());
        refuse_records(
            files,
            "texts without tokens",
            empty.map(|(_, &place)| (place, "a text is empty".to_owned())),
        )?;
        let mut encodings = encodings.into_iter();
        let example = |record: Record| {
            let encoding = encodings.next()?;
            let others = encodings.by_ref().take(record.texts.len() - 1).collect();
            Some(Example { encoding, target: Related { others, score: record.score } })
        };
        Ok(records.into_iter().map_while(example).collect())
    }

    /// A text's embedding, of all outputs or of it alone.
    ///
    /// # Errors
    /// It has another width than the model.
    fn embedding<'o>(&self, outputs: &'o Outputs) -> Result<impl Iterator<Item = f32> + use<'o>> {
        let row = outputs.last().context("a text has no embedding")?;
        anyhow::ensure!(
            row.dim() == (1, self.channels),
            "the model gives {:?} numbers where one row of {} is due: export it again",
            row.dim(),
            self.channels
        );
        Ok(row.iter().copied())
    }

    /// Its first `width` numbers, of length 1 again where the whole has that.
    fn shortened(&self, outputs: &Outputs, width: usize) -> Result<Vec<f32>> {
        let mut row: Vec<f32> = self.embedding(outputs)?.take(width).collect();
        if self.normalized && width < self.channels {
            to_length_one(&mut row);
        }
        Ok(row)
    }

    /// The mean loss, as training has it in batches of [`MEASURED`] examples in the order of the file.
    fn mean_loss(&self, rows: &Array2<f32>, examples: &[(&Encoding, &Related)]) -> Result<f64> {
        let (mut sum, mut at) = (0.0, 0);
        for batch in examples.chunks(MEASURED) {
            let related: Vec<&Related> = batch.iter().map(|(_, related)| *related).collect();
            let texts: usize = related.iter().map(|related| 1 + related.others.len()).sum();
            let own = rows.slice(ndarray::s![at..at + texts, ..]);
            let own = Tensor::from_vec(own.iter().copied().collect(), (texts, self.channels), &Device::Cpu)?;
            sum += f64::from(self.regime.sum(&own, &related)?.to_scalar::<f32>()?);
            at += texts;
        }
        Ok(sum / examples.len() as f64)
    }
}
