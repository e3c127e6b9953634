//! Records as `serve-batch` answers them: tokenized, batched, run and answered; once, or for hours.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, json};

use crate::data::batch::Encoding;
use crate::data::records::Row;
use crate::parity::inputs;
use crate::predict::{Asked, Predictor};
use crate::saved::Saved;
use crate::say::Say;
use crate::task::Answer;
use crate::{Result, process};

/// What was measured of whole records.
#[derive(Clone, Debug, Serialize)]
pub struct Whole {
    pub records: usize,
    /// Of the records, those that can't be used; they are left out.
    pub errors: usize,
    pub tokens: usize,
    /// Tokens that were computed over those that the records have.
    pub padding: f64,
    pub seconds: f64,
    pub records_per_second: f64,
    pub tokens_per_second: f64,
}

/// What was seen while records were answered again and again.
#[derive(Clone, Debug, Serialize)]
pub struct Soaked {
    pub seconds: f64,
    pub passes: usize,
    pub records_per_second: f64,
    /// Bytes of memory after a quarter of the time, and at the end.
    pub rss_bytes: [u64; 2],
    /// Passes with other answers than the first.
    pub other_answers: usize,
    pub pass: bool,
}

/// By which share, and by how many bytes, memory may grow in the last three quarters of a soak.
const GROWTH: (f64, u64) = (0.05, 16_000_000);

/// How often a soak tells how it goes.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Answers all records once: what was measured, and the answers.
fn answered(predictor: &Predictor, rows: &[Row]) -> Result<(Whole, Vec<Answer>)> {
    let started = Instant::now();
    let read = predictor.reader();
    let asked: Vec<Asked> = rows.iter().filter_map(|row| read(row).ok()).collect();
    let answers = predictor.answers(&asked.iter().collect::<Vec<_>>())?;
    let seconds = started.elapsed().as_secs_f64();
    let lengths: Vec<usize> = asked.iter().flat_map(Asked::encodings).map(Encoding::len).collect();
    let tokens: usize = lengths.iter().sum();
    let whole = Whole {
        records: rows.len(),
        errors: rows.len() - asked.len(),
        tokens,
        padding: predictor.pool().padded_tokens(&lengths) as f64 / tokens.max(1) as f64,
        seconds,
        records_per_second: asked.len() as f64 / seconds,
        tokens_per_second: tokens as f64 / seconds,
    };
    Ok((whole, answers))
}

impl Whole {
    /// The median of passes over all records, of so long at least.
    ///
    /// # Errors
    /// The model fails.
    pub fn measure(predictor: &Predictor, rows: &[Row], time: Duration) -> Result<Self> {
        answered(predictor, &rows[..rows.len().min(64)])?; // what is done once
        let started = Instant::now();
        let mut passes = vec![answered(predictor, rows)?.0];
        while started.elapsed() < time {
            passes.push(answered(predictor, rows)?.0);
        }
        passes.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        Ok(passes.swap_remove(passes.len() / 2))
    }
}

impl Soaked {
    /// Answers all records again and again for so long, and compares every pass with the first.
    ///
    /// # Errors
    /// The model fails.
    pub fn soak(predictor: &Predictor, rows: &[Row], time: Duration, say: Say) -> Result<Self> {
        let started = Instant::now();
        let (_, wanted) = answered(predictor, rows)?;
        let (mut passes, mut records, mut other_answers, mut told) = (1, rows.len(), 0, Instant::now());
        let mut quarter = None;
        while started.elapsed() < time || quarter.is_none() {
            let (_, answers) = answered(predictor, rows)?;
            passes += 1;
            records += rows.len();
            other_answers += usize::from(answers != wanted);
            if quarter.is_none() && started.elapsed() >= time / 4 {
                quarter = Some(process::rss_bytes());
            }
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                let seconds = started.elapsed().as_secs_f64();
                say.line(format!(
                    "{seconds:.0} s: {:.0} records/s, {:.1} MB, {other_answers} of {passes} passes with other answers",
                    records as f64 / seconds,
                    process::rss_bytes() as f64 / 1e6
                ));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let rss_bytes = [quarter.unwrap_or_default(), process::rss_bytes()];
        let most = rss_bytes[0] as f64 * (1.0 + GROWTH.0) + GROWTH.1 as f64;
        Ok(Self {
            seconds,
            passes,
            records_per_second: records as f64 / seconds,
            rss_bytes,
            other_answers,
            pass: other_answers == 0 && rss_bytes[1] as f64 <= most,
        })
    }
}

/// The built-in texts as records of any task: each is what its fields are for, and has a mask in front where the
/// tokenizer knows one and the task looks for it.
///
/// # Errors
/// The tokenizer fails on them.
pub fn builtin(saved: &Saved) -> Result<Vec<Row>> {
    let mask = saved.tokenizer.mask().and_then(|id| saved.tokenizer.inner().id_to_token(id));
    let mask = mask.filter(|_| saved.task.name().contains("masked")).unwrap_or_default();
    let texts = inputs::of_agreement(saved)?;
    let row = |(line, (text, pair)): (usize, (String, Option<String>))| {
        let mut fields = Map::new();
        for (name, value) in [
            ("text", Some(format!("{mask} {text}"))),
            ("text_pair", pair),
            ("question", Some("Who was it?".to_owned())),
            ("context", Some(text)),
        ] {
            fields.extend(value.map(|value| (name.to_owned(), json!(value))));
        }
        Row::new(line + 1, fields)
    };
    Ok(texts.into_iter().enumerate().map(row).collect())
}
