//! Next-sentence prediction: whether the second of two texts follows the first.

mod corpus;
#[cfg(test)]
mod tests;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub use self::corpus::{Chunk, Corpus, Pair};
use super::masked_lm::{self, encoded, read, write_class};
use super::scores::{argmax, cross_entropy, short, softmax};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Metrics,
    Objective, Output, Outputs, Start,
};
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Columns, Files, How, Row, TextUnit};
use crate::data::tokens::Tokenizer;
use crate::eager::kernels::dropout::mix;
use crate::eager::{Eager, X};
use crate::model::{Head, ModelConfig};

/// The names of the two scores, in the order of BERT's head.
pub const LABELS: [&str; 2] = ["IsNext", "NotNext"];

/// What one text of a .txt file is, where nobody says otherwise.
pub(super) const UNIT: Option<TextUnit> = Some(TextUnit::Document);

/// A model of what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextSentence;

/// Flags of records: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct RecordFlags {}

/// Flags of training: it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct TrainingFlags {}

/// Flags of answers: it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
pub struct AnswerFlags {}

/// A pair, and where others are drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Follows {
    /// None of a pair that stands for itself.
    pub chunk: Option<Chunk>,
    /// Whether the second text follows the first.
    pub follows: bool,
}

impl Objective for NextSentence {
    const NAME: &'static str = "next-sentence";
    const HEAD: Head = Head::NextSentence;
    const TEXTS_LEARNT: &'static [&'static str] = &["text"];
    const TEXTS_ASKED: &'static [&'static str] = &["text", "text_pair"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["label", "score", "scores"];
    const RECORD_FLAGS: &'static [&'static str] = &["--text-unit"];

    type Target = Follows;
    type Question = ();

    fn from_config(_: &ModelConfig) -> Result<Self> {
        Ok(Self)
    }

    fn write_config(&self, config: &mut ModelConfig) {
        write_class(config, self.head());
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        masked_lm::reading(flags, UNIT)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Follows>> {
        let texts = read(start.train, start.records, UNIT)?;
        let (tokenizer, _) = start.tokenizer_of(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let examples = learnt(&texts, start.train, &tokenizer, start.max_length)?;
        Ok(Learning { task: Self, tokenizer, examples, files: Vec::new() })
    }

    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Follows>>> {
        learnt(&read(files, encoder.records, UNIT)?, files, encoder.tokenizer, encoder.max_length)
    }

    /// Each chunk parts in the same way every time.
    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Follows>>> {
        let texts = read(files, encoder.records, UNIT)?;
        let chunks = Corpus::new(&texts, files, encoder.tokenizer)?.chunks(encoder.max_length)?;
        chunks.into_iter().zip(0..).map(|(chunk, i)| example(chunk, mix(i))).collect()
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        masked_lm::look(files, flags, UNIT)
    }

    fn beside(&self, target: &Follows, _: &Tokenizer) -> Beside {
        Beside::Example(
            if target.follows { "the second text follows" } else { "the second text is another's" }
                .to_owned(),
        )
    }

    fn drawn(&self, learnt: &Example<Follows>, key: u64) -> Result<Option<Example<Follows>>> {
        learnt.target.chunk.clone().map(|chunk| example(chunk, key)).transpose()
    }

    fn head(&self) -> Head {
        Self::HEAD
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        vec![Output { name: "seq_relationship_logits", dims: vec![Dim::Batch, Dim::Of(2)] }]
    }

    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Follows)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let [scores] = &outputs[..] else { anyhow::bail!("the model has {} outputs", outputs.len()) };
        let follows: Vec<bool> = examples.iter().map(|(_, target)| target.follows).collect();
        Ok(vec![loss(eager, scores, &follows, label_smoothing, of[0])?])
    }

    fn metrics(&self) -> &'static [Metric] {
        const { &[Metric::rising("accuracy")] }
    }

    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Follows]) -> Result<Measured> {
        let rows = outputs.iter().map(|outputs| row(outputs.first())).collect::<Result<Vec<_>>>()?;
        Ok(measured(&rows, targets.iter().map(|target| target.follows)).into())
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns()
    }

    fn check_room(&self, asking: &Asking) -> Result<()> {
        asking.tokenizer.encode("", Some("a pair"), asking.max_length).map(drop)
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, ()), BadRow> {
        let pair = row.text(&asking.columns, "text_pair")?;
        if pair.is_empty() {
            return Err(row.bad("the second text is empty"));
        }
        Ok((vec![encoded(row, Some(pair), asking)?], ()))
    }

    fn answer(&self, (): &(), outputs: &[Outputs], _: &Asking) -> Result<Answer> {
        Ok(answer(&row(outputs.first().and_then(|outputs| outputs.first()))?))
    }
}

/// Documents' chunks, which part elsewhere at every step.
fn learnt(
    texts: &[String],
    files: &Files,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Example<Follows>>> {
    let chunks = Corpus::new(texts, files, tokenizer)?.chunks(max_length)?;
    chunks.into_iter().map(|chunk| example(chunk, 0)).collect()
}

/// The pair that a key draws.
fn example(chunk: Chunk, key: u64) -> Result<Example<Follows>> {
    let Pair { encoding, follows, .. } = chunk.pair(key)?;
    Ok(Example { encoding, target: Follows { chunk: Some(chunk), follows } })
}

/// The sum of the cross-entropies of pairs, divided by `of`.
pub(super) fn loss(eager: &Eager, scores: &X, follows: &[bool], smoothing: f64, of: f64) -> Result<Tensor> {
    let wanted: Vec<Option<u32>> = follows.iter().map(|&follows| Some(label(follows) as u32)).collect();
    eager.cross_entropy(scores, &wanted, smoothing as f32, 1.0 / of as f32)
}

/// The place of what is right among [`LABELS`].
fn label(follows: bool) -> usize {
    usize::from(!follows)
}

/// The two scores of a pair.
pub(super) fn row(output: Option<&ndarray::Array2<f32>>) -> Result<[f32; 2]> {
    match output.map(|output| (output.dim(), output.as_slice())) {
        Some(((1, 2), Some(&[is, not]))) => Ok([is, not]),
        other => anyhow::bail!("the model gives {other:?} where two scores are due"),
    }
}

/// The share of pairs that are told right, and their mean loss in nats.
pub(super) fn measured(rows: &[[f32; 2]], follows: impl Iterator<Item = bool>) -> Metrics {
    let (mut right, mut loss) = (0.0, 0.0);
    for (row, follows) in rows.iter().zip(follows) {
        right += f64::from(u8::from(argmax(row) == label(follows)));
        loss += cross_entropy(row, label(follows));
    }
    let count = rows.len() as f64;
    Metrics::from([("accuracy".to_owned(), right / count), ("loss".to_owned(), loss / count)])
}

/// What is said of a pair.
pub(super) fn answer(row: &[f32; 2]) -> Answer {
    if row.iter().any(|score| !score.is_finite()) {
        return Err(format!("the model's logits are not finite: {row:?}"));
    }
    let (best, probabilities) = (argmax(row), softmax(row));
    let scores = LABELS.iter().zip(&probabilities).map(|(name, &p)| ((*name).to_owned(), short(p)));
    Ok(Map::from_iter([
        ("label".to_owned(), json!(LABELS[best])),
        ("score".to_owned(), short(probabilities[best])),
        ("scores".to_owned(), Value::Object(scores.collect())),
    ]))
}
