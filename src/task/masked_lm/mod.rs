//! Masked language modelling: the words that are hidden in a text.

mod masking;

use std::sync::Arc;

use anyhow::Context;
use candle_core::Tensor;
use ndarray::{Array2, ArrayView1};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

pub use self::masking::Masking;
pub(super) use self::masking::below;

use super::scores::{argmax, cross_entropy, serialize_short, softmax};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Metrics,
    Objective, Output, Outputs, SharedTrainingFlags, Start,
};
use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::{self, BadRow, Columns, Files, How, Row, TextUnit};
use crate::data::tokens::Tokenizer;
use crate::data::windows::windows;
use crate::eager::kernels::dropout::mix;
use crate::eager::{Eager, Forward, X};
use crate::model::{Head, ModelConfig};
use crate::{Result, bail_unusable};

/// The share of tokens that evaluations ask for, and training where nobody says otherwise.
const PROBABILITY: f64 = 0.15;
/// Fills of a mask, where nobody says how many.
const FILLS: usize = 5;

/// A model of the tokens that stand in masked places.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskedLm {
    /// V, the scores of a place.
    pub vocabulary: usize,
    /// How a model that learns is asked.
    pub masking: Option<Masking>,
}

/// Flags of records: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct RecordFlags {}

/// Flags of training: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct TrainingFlags {}

/// Flags of answers: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
pub struct AnswerFlags {}

/// What of a text is to be found.
#[derive(Clone, Debug, PartialEq)]
pub struct Masked {
    /// (T): the word of the text that each token is of; none of what the tokenizer puts around it.
    pub words: Arc<[Option<u32>]>,
    /// (T): the tokens that stood where they are to be found.
    pub wanted: Vec<Option<u32>>,
}

impl Masked {
    /// How many tokens are to be found.
    pub fn count(&self) -> usize {
        self.wanted.iter().flatten().count()
    }

    /// The tokens that are to be found.
    pub fn beside(&self, tokenizer: &Tokenizer) -> Beside {
        let name = |id: u32| tokenizer.inner().id_to_token(id).unwrap_or_default();
        Beside::Tokens(self.wanted.iter().map(|wanted| wanted.map(name)).collect())
    }

    /// The places of those that are to be found.
    pub fn places(&self) -> Vec<usize> {
        (0..self.wanted.len()).filter(|&at| self.wanted[at].is_some()).collect()
    }

    /// What is to be found in each row of scores: the first token's, and one for each place.
    pub fn of_rows(&self) -> impl Iterator<Item = Option<u32>> + '_ {
        let rest = self.wanted.iter().skip(1).filter(|wanted| wanted.is_some());
        self.wanted.iter().take(1).chain(rest).copied()
    }
}

/// The masks of a text that is asked about.
pub struct Question {
    places: Vec<usize>,
}

impl Objective for MaskedLm {
    const NAME: &'static str = "masked-lm";
    const PIPELINE_TAG: Option<&'static str> = Some("fill-mask");
    const HEAD: Head = Head::MaskedLm;
    const TEXTS_LEARNT: &'static [&'static str] = &["text"];
    const TEXTS_ASKED: &'static [&'static str] = &["text"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["fills"];
    const RECORD_FLAGS: &'static [&'static str] = &["--text-unit"];
    const TRAINING_FLAGS: &'static [&'static str] = &["--mask-probability", "--whole-words"];
    const ANSWER_FLAGS: &'static [&'static str] = &["--top-k"];

    type Target = Masked;
    type Question = Question;

    /// # Errors
    /// The head does not share the weight of the word embeddings.
    fn from_config(config: &ModelConfig) -> Result<Self> {
        check_tied(config)?;
        Ok(Self { vocabulary: config.vocab_size(), masking: None })
    }

    fn write_config(&self, config: &mut ModelConfig) {
        write_class(config, self.head());
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        reading(flags, None)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Masked>> {
        let texts = read(start.train, start.records, None)?;
        let (tokenizer, _) = start.tokenizer_of(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let task = Self::from_config(&start.config).map_err(|error| start.in_config(error))?;
        let masking = Masking::learnt(&tokenizer, task.vocabulary, &start.training.shared)?;
        let examples = learnt(&texts, start.train, &tokenizer, start.max_length)?;
        Ok(Learning { task: Self { masking: Some(masking), ..task }, tokenizer, examples, files: Vec::new() })
    }

    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Masked>>> {
        learnt(&read(files, encoder.records, None)?, files, encoder.tokenizer, encoder.max_length)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        look(files, flags, None)
    }

    fn beside(&self, target: &Masked, tokenizer: &Tokenizer) -> Beside {
        target.beside(tokenizer)
    }

    /// Each text is masked in the same way every time.
    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Masked>>> {
        let Encoder { records, tokenizer, max_length, .. } = *encoder;
        let masking = Masking::measured(tokenizer, self.vocabulary)?;
        let texts = framed(&read(files, records, None)?, files, tokenizer, max_length)?;
        let masked =
            texts.iter().zip(0..).map(|((encoding, words), i)| masking.masked(encoding, words, mix(i)));
        Ok(masked.collect())
    }

    fn losses(target: &Masked) -> Vec<usize> {
        vec![target.count()]
    }

    fn drawn(&self, example: &Example<Masked>, key: u64) -> Result<Option<Example<Masked>>> {
        let masked = |masking: &Masking| masking.masked(&example.encoding, &example.target.words, key);
        Ok(self.masking.as_ref().map(masked))
    }

    fn asked(target: &Masked) -> Option<Vec<usize>> {
        Some(target.places())
    }

    fn head(&self) -> Head {
        Head::MaskedLm
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        vec![Output { name: "logits", dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(self.vocabulary)] }]
    }

    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Masked)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let scores = outputs.first().context("the model has no output")?;
        let wanted: Vec<Option<u32>> = examples.iter().flat_map(|(_, masked)| masked.of_rows()).collect();
        Ok(vec![eager.cross_entropy(scores, &wanted, label_smoothing as f32, 1.0 / of[0] as f32)?])
    }

    fn metrics(&self) -> &'static [Metric] {
        const { &[Metric::LOSS, Metric::falling("perplexity"), Metric::rising("accuracy")] }
    }

    /// The scores of places that nobody asks for are not computed.
    fn measure(&self, model: &Forward, examples: &[(&Encoding, &Masked)]) -> Result<Measured> {
        let encodings: Vec<&Encoding> = examples.iter().map(|(encoding, _)| *encoding).collect();
        let kept = model.asked(
            &encodings,
            |i| Some(examples[i].1.places()),
            |i, outputs| {
                let wanted: Vec<Option<u32>> = examples[i].1.of_rows().collect();
                Ok(vec![found(one(&outputs)?, &wanted)?])
            },
        )?;
        let targets: Vec<&Masked> = examples.iter().map(|(_, target)| *target).collect();
        self.measure_outputs(&kept, &targets)
    }

    /// Each place's loss, and whether the token that stood there is the likeliest.
    fn kept(&self, outputs: Outputs, target: &Masked) -> Result<Outputs> {
        Ok(vec![found(one(&outputs)?, &target.wanted)?])
    }

    fn measure_outputs(&self, outputs: &[Outputs], _: &[&Masked]) -> Result<Measured> {
        Ok(measured(outputs.iter().flatten()).into())
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns()
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
        let encoding = encoded(row, None, asking)?;
        let places = masks(row, &encoding, asking)?;
        if places.is_empty() {
            let token = asking.tokenizer.mask().and_then(|id| asking.tokenizer.inner().id_to_token(id));
            return Err(row.bad(format!(
                "the text has no {}: there is nothing to find",
                token.as_deref().unwrap_or("mask")
            )));
        }
        Ok((vec![encoding], Question { places }))
    }

    fn answer(&self, question: &Question, outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        let [outputs] = outputs else { anyhow::bail!("{} outputs for one text", outputs.len()) };
        let fills = fills(one(outputs)?, &question.places, asking)?;
        Ok(fills.map(|fills| Map::from_iter([("fills".to_owned(), fills)])))
    }
}

impl Masking {
    /// How a model that learns is asked.
    ///
    /// # Errors
    /// Unusable: a tokenizer without a mask, or a share that is none.
    pub(super) fn learnt(
        tokenizer: &Tokenizer,
        vocabulary: usize,
        flags: &SharedTrainingFlags,
    ) -> Result<Self> {
        let probability = flags.mask_probability.unwrap_or(PROBABILITY);
        if !(probability > 0.0 && probability <= 1.0) {
            bail_unusable!("--mask-probability is {probability}, expected a share above 0, up to 1");
        }
        Ok(Self { probability, whole_words: flags.whole_words, ..Self::measured(tokenizer, vocabulary)? })
    }

    /// How a model is asked that is measured.
    ///
    /// # Errors
    /// Unusable: a tokenizer without a mask.
    pub(super) fn measured(tokenizer: &Tokenizer, vocabulary: usize) -> Result<Self> {
        let Some(mask) = tokenizer.mask().filter(|&mask| (mask as usize) < vocabulary) else {
            bail_unusable!(
                "the model's tokenizer has no token for what is masked: [MASK], <mask>, or mask_token of \
                 tokenizer_config.json"
            );
        };
        let vocabulary = vocabulary.min(tokenizer.vocab_size());
        Ok(Self { probability: PROBABILITY, whole_words: false, mask, vocabulary })
    }
}

/// Refuses a model whose head has a matrix of its own.
///
/// # Errors
/// Unusable: says so.
pub(super) fn check_tied(config: &ModelConfig) -> Result<()> {
    if config.raw.get("tie_word_embeddings").and_then(Value::as_bool) == Some(false) {
        bail_unusable!("tie_word_embeddings is false; tk's head shares the weight of the word embeddings");
    }
    Ok(())
}

/// Names the class of a model with a head that has no labels.
pub(super) fn write_class(config: &mut ModelConfig, head: Head) {
    let class = config.family.class(head);
    config.raw.insert("architectures".to_owned(), json!([class]));
    for key in ["id2label", "label2id", "num_labels", "problem_type"] {
        config.raw.remove(key);
    }
}

/// How texts stand in a file, where one of a `.txt` file is this.
pub(super) fn reading(flags: &super::RecordFlags, unit: Option<TextUnit>) -> (How, Columns) {
    (How { unit: flags.shared.text_unit.or(unit), ..flags.reading.how() }, flags.texts.columns())
}

/// The texts as they are.
///
/// # Errors
/// As [`read`].
pub(super) fn look(files: &Files, flags: &super::RecordFlags, unit: Option<TextUnit>) -> Result<Vec<Look>> {
    let (how, columns) = reading(flags, unit);
    records::read_examples(files, &how, |row| {
        Ok(Look::of_text(row.place(), row.text(&columns, "text")?.to_owned()))
    })
}

/// Reads every text.
///
/// # Errors
/// Unusable: the file can't be read, has no records, or has records without text; the first of them are listed with
/// file and line.
pub(super) fn read(files: &Files, flags: &super::RecordFlags, unit: Option<TextUnit>) -> Result<Vec<String>> {
    Ok(look(files, flags, unit)?.into_iter().flat_map(|look| look.texts).map(|(text, _)| text).collect())
}

/// Texts of which every step masks other tokens.
///
/// # Errors
/// As [`framed`].
fn learnt(
    texts: &[String],
    files: &Files,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Example<Masked>>> {
    let of_text = |(encoding, words): (Encoding, Vec<Option<u32>>)| Example {
        target: Masked { wanted: vec![None; words.len()], words: words.into() },
        encoding,
    };
    Ok(framed(texts, files, tokenizer, max_length)?.into_iter().map(of_text).collect())
}

/// Texts between the tokens that the tokenizer puts around them, with their words. One that is longer than `max_length`
/// is cut between words, and nothing is lost; one without tokens is left out.
///
/// # Errors
/// Unusable: no text has a token; a tokenizer that does not keep a text's tokens together.
fn framed(
    texts: &[String],
    files: &Files,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<(Encoding, Vec<Option<u32>>)>> {
    let (before, behind) = tokenizer.frame()?;
    let room = max_length.saturating_sub(before + behind);
    let parts = |text: &String| {
        let pieces = tokenizer.pieces(text)?;
        let lengths: Vec<usize> = pieces.words.chunk_by(|a, b| a == b).map(<[usize]>::len).collect();
        let part = |window: crate::data::windows::Window| {
            let encoding = tokenizer.framed(&pieces.ids[window.tokens.clone()])?;
            let mut words = vec![None; before];
            words.extend(pieces.words[window.tokens].iter().map(|&word| Some(word as u32)));
            words.resize(encoding.len(), None);
            Ok((encoding, words))
        };
        windows(&lengths, room, 0)?.into_iter().map(part).collect::<Result<Vec<_>>>()
    };
    let mut framed = Vec::new();
    let of = format!("{} {max_length}", MaskedLm::NAME);
    let own = |text: &String, key: &mut Key| key.add(Some(text));
    tokenizer.in_order(&of, texts, own, parts, |_, parts| {
        framed.append(&mut parts?);
        Ok(())
    })?;
    if framed.is_empty() {
        bail_unusable!("{files}: no text has a token that could be masked");
    }
    Ok(framed)
}

/// The only output of a record.
fn one(outputs: &Outputs) -> Result<&Array2<f32>> {
    match &outputs[..] {
        [scores] => Ok(scores),
        others => anyhow::bail!("the model gives {} outputs", others.len()),
    }
}

/// (found, 2): the loss of each row that something is to be found in, and 1 where that is the likeliest.
pub(super) fn found(scores: &Array2<f32>, wanted: &[Option<u32>]) -> Result<Array2<f32>> {
    anyhow::ensure!(scores.nrows() == wanted.len(), "{} rows for {} tokens", scores.nrows(), wanted.len());
    let rows: Vec<(ArrayView1<f32>, u32)> =
        scores.rows().into_iter().zip(wanted).filter_map(|(row, wanted)| Some((row, (*wanted)?))).collect();
    let of_row = |(row, wanted): &(ArrayView1<f32>, u32)| {
        let (row, wanted) = (row.to_vec(), *wanted as usize);
        anyhow::ensure!(wanted < row.len(), "token {wanted} of a vocabulary of {}", row.len());
        Ok([cross_entropy(&row, wanted) as f32, f32::from(u8::from(argmax(&row) == wanted))])
    };
    let found = rows.par_iter().map(of_row).collect::<Result<Vec<_>>>()?;
    Ok(Array2::from(found))
}

/// The metrics of what was [found]: mean loss in nats a masked token, perplexity, and the share of tokens that are the
/// likeliest.
pub(super) fn measured<'k>(found: impl Iterator<Item = &'k Array2<f32>>) -> Metrics {
    let (mut loss, mut right, mut count) = (0.0, 0.0, 0);
    for row in found.flat_map(|found| found.rows()) {
        loss += f64::from(row[0]);
        right += f64::from(row[1]);
        count += 1;
    }
    let loss = loss / f64::from(count);
    Metrics::from([
        ("loss".to_owned(), loss),
        ("perplexity".to_owned(), loss.exp()),
        ("accuracy".to_owned(), right / f64::from(count)),
    ])
}

/// A record's text, with a second one.
pub(super) fn encoded(row: &Row, pair: Option<&str>, asking: &Asking) -> Result<Encoding, BadRow> {
    let text = row.text(&asking.columns, "text")?;
    asking.tokenizer.encode(text, pair, asking.max_length).map_err(|error| row.bad(format!("{error:#}")))
}

/// Where a record's masks stand.
///
/// # Errors
/// One of them stands behind the tokens that the model reads.
pub(super) fn masks(row: &Row, encoding: &Encoding, asking: &Asking) -> Result<Vec<usize>, BadRow> {
    let Some(mask) = asking.tokenizer.mask() else { return Ok(Vec::new()) };
    let of = |ids: &[u32]| (0..ids.len()).filter(|&at| ids[at] == mask).collect::<Vec<usize>>();
    let places = of(&encoding.ids);
    if encoding.truncated {
        let bad = |error: anyhow::Error| row.bad(format!("{error:#}"));
        let pair = row.optional_text(&asking.columns, "text_pair")?;
        let whole =
            asking.tokenizer.encode(row.text(&asking.columns, "text")?, pair, usize::MAX).map_err(bad)?;
        let lost = of(&whole.ids).len() - places.len();
        if lost > 0 {
            return Err(row.bad(format!(
                "{lost} of the text's masks stand outside of the {} tokens that the model reads",
                asking.max_length
            )));
        }
    }
    Ok(places)
}

/// A token that may stand at a mask.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Fill {
    token: String,
    /// Its probability.
    #[serde(serialize_with = "serialize_short")]
    score: f32,
}

/// For each mask its likeliest tokens, with their probabilities.
pub(super) fn fills(
    scores: &Array2<f32>,
    places: &[usize],
    asking: &Asking,
) -> Result<Result<Value, String>> {
    let most = asking.flags.shared.top_k.unwrap_or(FILLS);
    let mut fills = Vec::with_capacity(places.len());
    for &at in places {
        anyhow::ensure!(at < scores.nrows(), "the model gives {} rows", scores.nrows());
        let row = scores.row(at).to_vec();
        if let Some(bad) = row.iter().find(|score| !score.is_finite()) {
            return Ok(Err(format!("the model's logits are not finite: {bad}")));
        }
        let probabilities = softmax(&row);
        let mut order: Vec<usize> = (0..row.len()).collect();
        let most = most.clamp(1, row.len());
        let before = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
        if most < order.len() {
            order.select_nth_unstable_by(most, before);
            order.truncate(most);
        }
        order.sort_unstable_by(before);
        let fill = |&id: &usize| {
            let token = asking.tokenizer.inner().decode(&[id as u32], false);
            let token = token.map_err(|error| anyhow::anyhow!(error)).context("decoding a token")?;
            Ok(json!(Fill { token, score: probabilities[id] }))
        };
        fills.push(Value::Array(order.iter().map(fill).collect::<Result<_>>()?));
    }
    Ok(Ok(Value::Array(fills)))
}
