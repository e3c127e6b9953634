//! Extractive question answering: a question and a text → the part of the text that answers it, or none.

mod decode;
mod records;
mod reviewed;
pub mod squad;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use self::decode::{Answers, Limits, Scored, answers};
use self::records::{examples_of, read};
use self::squad::{Judged, Match, best_threshold};
use super::flags::refuse_records;
use super::review::{Review, Source};
use super::scores::{cross_entropy, serialize_short};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Metrics,
    Objective, Output, Outputs, Start,
};
use crate::data::batch::Encoding;
use crate::data::offsets::OffsetUnit;
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::{SecondText, Tokenizer};
use crate::eager::kernels::reorder::side_by_side;
use crate::eager::{Eager, Forward, X, tensors};
use crate::model::ops::Ops;
use crate::model::{Family, Head, ModelConfig};
use crate::{Result, unusable};

/// What a model knows of questions.
#[derive(Clone, Debug, PartialEq)]
pub struct QuestionAnswering {
    /// Where it has learnt that some questions have no answer in their text: how much likelier than the best answer none
    /// must be, to be the answer.
    pub null_threshold: Option<f64>,
}

/// The key of config.json that keeps the threshold, by the name that transformers' `run_qa.py` has for it.
const NULL_THRESHOLD: &str = "null_score_diff_threshold";

/// Where questions and texts stand, how texts are read, and how answers are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct QuestionFlags {
    /// For question-answering, the column of the question [default: question].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question_column: Option<String>,
    /// For question-answering, the column of the text that the answer stands in [default: context].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_column: Option<String>,
    /// For question-answering, the tokens that neighbouring windows of a long text share [default: 128, or half of
    /// --max-length].
    #[arg(long, value_name = "N", help_heading = "Questions")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doc_stride: Option<usize>,
    /// Tokens of the longest answer [default: 30].
    #[arg(long, value_name = "N", help_heading = "Questions", value_parser = clap::value_parser!(u32).range(1..))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_answer_length: Option<u32>,
    /// Answers of each window that are compared [default: 20].
    #[arg(long, value_name = "N", help_heading = "Questions", value_parser = clap::value_parser!(u32).range(1..=1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_best: Option<u32>,
}

impl QuestionFlags {
    fn columns(&self) -> Columns {
        Columns::default()
            .with("question", self.question_column.clone())
            .with("context", self.context_column.clone())
    }

    fn limits(&self) -> Limits {
        Limits {
            max_answer_length: self.max_answer_length.unwrap_or(30) as usize,
            n_best: self.n_best.unwrap_or(20) as usize,
        }
    }

    fn stride(&self, max_length: usize) -> usize {
        self.doc_stride.unwrap_or(128.min(max_length / 2))
    }
}

/// Flags of questions, their texts and their answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct RecordFlags {
    /// For question-answering, the column of the right answers, {"text": […], "answer_start": […]} [default: answers].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers_column: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub questions: QuestionFlags,
}

/// Flags of training: it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct TrainingFlags {}

/// Flags of answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct AnswerFlags {
    #[command(flatten)]
    #[serde(flatten)]
    pub questions: QuestionFlags,
}

/// What a window of a question's text ought to give.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Which of the file's questions it is of.
    pub question: usize,
    /// The tokens that the answer begins and ends with; the first one of the window for both, where it is not in it.
    pub tokens: (usize, usize),
    context: Arc<str>,
    right: Arc<[String]>,
    text: SecondText,
    limits: Limits,
}

/// A question that is asked.
pub struct Question {
    context: String,
    /// The text in each window.
    windows: Vec<SecondText>,
    limits: Limits,
}

impl Objective for QuestionAnswering {
    const NAME: &'static str = "question-answering";
    const PIPELINE_TAG: Option<&'static str> = Some(Self::NAME);
    const HEAD: Head = Head::QuestionAnswering;
    const TEXTS_LEARNT: &'static [&'static str] = &[];
    const TEXTS_ASKED: &'static [&'static str] = &[];
    const FIELDS_ASKED: &'static [&'static str] = &["question", "context"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["answer", "start", "end", "score", "answers"];
    const ANSWER_FLAGS: &'static [&'static str] = &["--offset-unit", "--top-k"];

    type Target = Wanted;
    type Question = Question;

    fn from_config(config: &ModelConfig) -> Result<Self> {
        let null_threshold = match config.raw.get(NULL_THRESHOLD) {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_f64()
                    .ok_or_else(|| unusable!("{NULL_THRESHOLD} is {value}, a number was expected"))?,
            ),
        };
        Ok(Self { null_threshold })
    }

    fn write_config(&self, config: &mut ModelConfig) {
        let class = config.family.class(self.head());
        let raw = &mut config.raw;
        raw.insert("architectures".to_owned(), json!([class]));
        // the head's size is not that of labels
        for key in ["id2label", "label2id", "num_labels", "problem_type", NULL_THRESHOLD] {
            raw.remove(key);
        }
        if let Some(threshold) = self.null_threshold {
            raw.insert(NULL_THRESHOLD.to_owned(), json!(threshold));
        }
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        let own = &flags.question_answering;
        (flags.reading.how(), own.questions.columns().with("answers", own.answers_column.clone()))
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Wanted>> {
        let tokenizer = start.tokenizer()?;
        let records = read(start.train, start.records)?;
        refuse_unplaced(&records, start.train)?;
        let some_have_none = records.iter().any(|record| record.answers.is_empty());
        let task = Self { null_threshold: some_have_none.then_some(0.0) };
        let flags = &start.records.question_answering.questions;
        let examples = examples_of(&records, start.train, &tokenizer, start.max_length, flags)?;
        Ok(Learning { task, tokenizer, examples, files: Vec::new() })
    }

    fn check_learnt(&self, files: &Files, flags: &super::RecordFlags) -> Result<()> {
        let records = read(files, flags)?;
        refuse_unplaced(&records, files)?;
        let without = records.iter().filter(|record| record.answers.is_empty());
        let without = without.filter(|_| self.null_threshold.is_none());
        let why =
            "all questions before it have one, and a model that may find none has to know it from the start";
        let without = without.map(|record| (record.at, why.to_owned()));
        refuse_records(files, "questions without an answer", without)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        let look = |record: records::Record| {
            let texts = vec![(record.question, Some(record.context.to_string()))];
            Look { place: record.at, texts, labels: Vec::new() }
        };
        Ok(records::read(files, flags)?.into_iter().map(look).collect())
    }

    fn beside(&self, target: &Wanted, _: &Tokenizer) -> Beside {
        let (first, last) = target.tokens;
        Beside::Example(match (first, last) {
            (0, 0) => "no answer in these tokens".to_owned(),
            _ => format!("the answer is the tokens {first} to {last}"),
        })
    }

    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Wanted>>> {
        let Encoder { records, tokenizer, max_length, .. } = *encoder;
        examples_of(
            &read(files, records)?,
            files,
            tokenizer,
            max_length,
            &records.question_answering.questions,
        )
    }

    fn summary(&self) -> Option<String> {
        self.null_threshold.map(|_| "some questions have no answer".to_owned())
    }

    fn smooths_labels(&self) -> bool {
        false
    }

    fn head(&self) -> Head {
        Head::QuestionAnswering
    }

    fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        match &family.define(o, self.head())?[..] {
            [scores] => o.split(scores, 2),
            others => anyhow::bail!("the head gives {} outputs", others.len()),
        }
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        ["start_logits", "end_logits"]
            .map(|name| Output { name, dims: vec![Dim::Batch, Dim::Sequence] })
            .to_vec()
    }

    /// The mean of both ends' cross-entropies over a window's tokens. Padding is not among them, as it is in
    /// transformers, whose loss changes with the batch.
    fn loss(
        &self,
        _: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Wanted)],
        _: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let outputs = tensors(outputs)?;
        let [start, end] = &outputs[..] else { anyhow::bail!("the model has {} outputs", outputs.len()) };
        let lengths: Vec<usize> = examples.iter().map(|(encoding, _)| encoding.len()).collect();
        let at =
            |end: fn(&Wanted) -> usize| examples.iter().map(|(_, wanted)| end(wanted)).collect::<Vec<_>>();
        let losses = (sum_of_losses(start, &lengths, &at(|wanted| wanted.tokens.0))?
            + sum_of_losses(end, &lengths, &at(|wanted| wanted.tokens.1))?)?;
        Ok(vec![(losses / (2.0 * of[0]))?])
    }

    fn metrics(&self) -> &'static [Metric] {
        const { &[Metric::percent("f1"), Metric::percent("exact_match")] }
    }

    /// Exact match and F1 in percent, as SQuAD's scripts give them.
    ///
    /// # Errors
    /// A window has other rows than its tokens.
    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Wanted]) -> Result<Measured> {
        Ok(self.measure_questions(&self.questions(outputs, targets)?, targets.len()))
    }

    fn review(
        &self,
        model: &Forward,
        examples: &[(&Encoding, &Wanted)],
        of: Source,
    ) -> Result<(Measured, Review)> {
        let (encodings, targets): (Vec<_>, Vec<_>) = examples.iter().copied().unzip();
        let outputs = model.outputs(&encodings)?;
        let questions = self.questions(&outputs, &targets)?;
        Ok((self.measure_questions(&questions, targets.len()), self.reviewed(&questions, of)?))
    }
    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.question_answering.questions.columns()
    }

    fn check_room(&self, asking: &Asking) -> Result<()> {
        asking.tokenizer.pair_windows("", "", asking.max_length, 0).map(drop)
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
        let question = row.text(&asking.columns, "question")?;
        let context = row.text(&asking.columns, "context")?.to_owned();
        let flags = &asking.flags.question_answering.questions;
        let stride = flags.stride(asking.max_length);
        let windows = asking.tokenizer.pair_windows(question, &context, asking.max_length, stride);
        let windows = windows.map_err(|error| row.bad(format!("{error:#}")))?;
        let (encodings, windows) = windows.into_iter().map(|window| (window.encoding, window.second)).unzip();
        Ok((encodings, Question { context, windows, limits: flags.limits() }))
    }

    fn answer(&self, question: &Question, outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        let flags = &asking.flags;
        anyhow::ensure!(outputs.len() == question.windows.len(), "a window has no output");
        let windows = outputs
            .iter()
            .zip(&question.windows)
            .map(|(outputs, text)| self.scored(outputs, text))
            .collect::<Result<Vec<_>>>()?;
        if let Some(bad) = windows.iter().flat_map(|w| w.start.iter().chain(&w.end)).find(|x| !x.is_finite())
        {
            return Ok(Err(format!("the model's logits are not finite: {bad}")));
        }
        let found = answers(&question.context, &windows, question.limits);
        let unit = flags.shared.offset_unit.unwrap_or_default();
        let top = found.found.iter().take(flags.shared.top_k.unwrap_or(1).max(1));
        let mut listed: Vec<Value> =
            top.map(|found| json!(Part::of(&question.context, &found.span, found.score, unit))).collect();
        if self.null_threshold.is_some() {
            let none = Part { answer: String::new(), start: 0, end: 0, score: found.null as f32 };
            let place = match self.says_none(&found) {
                true => 0,
                // not in front of what is said
                false => found.found.partition_point(|other| other.score >= found.null).max(1),
            };
            listed.insert(place.min(listed.len()), json!(none));
        }
        let Some(Value::Object(mut answer)) = listed.first().cloned() else {
            return Ok(Err("the text has no words that could be an answer".to_owned()));
        };
        if let Some(k) = flags.shared.top_k {
            listed.truncate(k);
            answer.insert("answers".to_owned(), json!(listed));
        }
        Ok(Ok(answer))
    }

    fn tuned(&self, best: &Measured) -> Option<Self> {
        let threshold = best.details.get(NULL_THRESHOLD)?.as_f64()?;
        self.null_threshold.map(|_| Self { null_threshold: Some(threshold) })
    }
}

/// Refuses answers to learn of which nobody says where they stand.
fn refuse_unplaced(records: &[records::Record], files: &Files) -> Result<()> {
    let unplaced = records.iter().filter(|record| record.place.is_none() && !record.answers.is_empty());
    let why = "an answer that is learnt needs its answer_start";
    let unplaced = unplaced.map(|record| (record.at, why.to_owned()));
    refuse_records(files, "answers without a place", unplaced)
}

/// A question, and the scores of what it was asked with.
struct Asked<'a> {
    wanted: &'a Wanted,
    windows: Vec<Scored<'a>>,
    /// The sum over the windows.
    loss: f64,
}

impl QuestionAnswering {
    /// Each question's scores, from its windows' outputs.
    ///
    /// # Errors
    /// A window has other rows than its tokens.
    fn questions<'t>(&self, outputs: &[Outputs], targets: &[&'t Wanted]) -> Result<Vec<Asked<'t>>> {
        let mut questions: Vec<Asked> = Vec::new();
        for (outputs, &wanted) in outputs.iter().zip(targets) {
            let scored = self.scored(outputs, &wanted.text)?;
            let (first, last) = wanted.tokens;
            anyhow::ensure!(first.max(last) < scored.start.len(), "a window has fewer scores than tokens");
            let loss = (cross_entropy(&scored.start, first) + cross_entropy(&scored.end, last)) / 2.0;
            match questions.last_mut() {
                Some(asked) if asked.wanted.question == wanted.question => {
                    asked.windows.push(scored);
                    asked.loss += loss;
                }
                _ => questions.push(Asked { wanted, windows: vec![scored], loss }),
            }
        }
        Ok(questions)
    }

    /// The metrics, and the mean loss of so many windows.
    fn measure_questions(&self, questions: &[Asked], count: usize) -> Measured {
        let losses: f64 = questions.iter().map(|asked| asked.loss).sum();
        let mut all: Vec<(bool, Match)> = Vec::with_capacity(questions.len());
        let mut judged = [Vec::new(), Vec::new()]; // by exact match, by F1
        for Asked { wanted, windows, .. } in questions {
            let found = answers(&wanted.context, windows, wanted.limits);
            let best = found.found.first();
            let text = best.map_or("", |best| &wanted.context[best.span.clone()]);
            let said = if self.says_none(&found) { "" } else { text };
            let answerable = !wanted.right.is_empty();
            all.push((answerable, Match::of(said, &wanted.right)));
            let bare = Match::of(text, &wanted.right);
            let null = found.null - best.map_or(0.0, |best| best.score);
            let answered = !text.is_empty();
            for (judged, score) in judged.iter_mut().zip([bare.exact, bare.f1]) {
                judged.push(Judged { null, answerable, answered, score });
            }
        }
        let percent = |which: &dyn Fn(bool) -> bool, how: fn(&Match) -> f64| {
            let own: Vec<f64> =
                all.iter().filter(|(answerable, _)| which(*answerable)).map(|(_, m)| how(m)).collect();
            100.0 * own.iter().sum::<f64>() / own.len() as f64
        };
        let metrics = Metrics::from([
            ("exact_match".to_owned(), percent(&|_| true, |m| m.exact)),
            ("f1".to_owned(), percent(&|_| true, |m| m.f1)),
            ("loss".to_owned(), losses / count as f64),
        ]);
        let mut details = Map::from_iter([("questions".to_owned(), json!(all.len()))]);
        if all.iter().any(|(answerable, _)| !answerable) {
            let [exact, f1] = judged.map(|judged| best_threshold(&judged));
            for (name, value) in [
                ("HasAns_exact", percent(&|answerable| answerable, |m| m.exact)),
                ("HasAns_f1", percent(&|answerable| answerable, |m| m.f1)),
                ("NoAns_exact", percent(&|answerable| !answerable, |m| m.exact)),
                ("NoAns_f1", percent(&|answerable| !answerable, |m| m.f1)),
                ("best_exact", 100.0 * exact.score),
                ("best_exact_thresh", exact.at),
                ("best_f1", 100.0 * f1.score),
                ("best_f1_thresh", f1.at),
                (NULL_THRESHOLD, f1.between),
            ] {
                details.insert(name.to_owned(), json!(value));
            }
        }
        Measured { metrics, details }
    }

    /// A window's scores, from its outputs. The first token stands for no answer where it is a special one, or where it is
    /// not the text's and the model has learnt so.
    ///
    /// # Errors
    /// There are others than two a token.
    fn scored<'a>(&self, outputs: &Outputs, text: &'a SecondText) -> Result<Scored<'a>> {
        let [start, end] = &outputs[..] else { anyhow::bail!("the model gives {} outputs", outputs.len()) };
        let SecondText { tokens, spans, behind_special } = text;
        anyhow::ensure!(
            start.dim() == end.dim()
                && start.ncols() == 1
                && start.nrows() >= tokens.end
                && spans.len() == tokens.len(),
            "the model gives scores of {:?} and {:?} where one a token is due: export it again",
            start.dim(),
            end.dim()
        );
        let column = |scores: &ndarray::Array2<f32>| scores.iter().copied().collect();
        let null = *behind_special || (self.null_threshold.is_some() && tokens.start > 0);
        Ok(Scored { start: column(start), end: column(end), text: tokens.clone(), spans, null })
    }

    /// Whether there is no answer.
    fn says_none(&self, answers: &Answers) -> bool {
        let best = answers.found.first().map_or(0.0, |best| best.score);
        answers.found.is_empty()
            || self.null_threshold.is_some_and(|threshold| answers.null - best > threshold)
    }
}

/// An answer as a record's fields. Where there is none, its text is empty.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Answer)]
pub struct Part {
    /// What stands there in the context, letter by letter.
    answer: String,
    /// Where it begins, in characters.
    start: usize,
    /// Behind its last character.
    end: usize,
    /// The probability of its beginning times that of its end.
    #[serde(serialize_with = "serialize_short")]
    score: f32,
}

impl Part {
    fn of(context: &str, span: &Range<usize>, score: f64, unit: OffsetUnit) -> Self {
        let Range { mut start, mut end } = span.clone();
        unit.convert(context, &mut [&mut start, &mut end]);
        Self { answer: context[span.clone()].to_owned(), start, end, score: score as f32 }
    }
}

/// The sum of the cross-entropies of one token of every sequence under the softmax over its own. `scores` are a packed
/// batch's, (T, 1).
fn sum_of_losses(scores: &Tensor, lengths: &[usize], targets: &[usize]) -> Result<Tensor> {
    let scores = scores.to_dtype(DType::F32)?.reshape(((), 1))?;
    let rows = side_by_side(&scores, lengths, MASKED)?.squeeze(2)?;
    let targets: Vec<u32> = targets.iter().map(|&target| target as u32).collect();
    let targets = Tensor::from_vec(targets, (lengths.len(), 1), scores.device())?;
    let log_p = candle_nn::ops::log_softmax(&rows, D::Minus1)?;
    Ok(log_p.gather(&targets, 1)?.sum_all()?.neg()?)
}

/// What no token has for a score: far below any, and far from overflowing.
const MASKED: f32 = -1e30;
