//! Texts → labels and scores.

use serde_json::json;

use super::{Answer, Job, Progress, Work};
use crate::data::batch::Encoding;
use crate::data::records::Row;
use crate::runtime::Provider;
use crate::saved::Saved;
use crate::serve::{Pool, served};
use crate::task::TextClassification;
use crate::task::examples::TextColumns;
use crate::{Result, checkpoint};

/// Records that are sorted by length and batched together.
const WINDOW: u64 = 4096;

struct Classify<'a> {
    task: &'a TextClassification,
    pool: Pool,
    with_logits: bool,
}

/// Labels every record.
pub(super) fn run(job: &Job, saved: &Saved, task: &TextClassification) -> Result<()> {
    let args = job.args;
    job.refuse_generation(saved.task.name())?;
    job.refuse_entities(saved.task.name())?;
    let max_length = saved.checked_max_length(args.max_length)?;
    // room for the special tokens
    saved.tokenizer.encode("", saved.tokenizer.takes_pairs().then_some("a pair"), max_length)?;
    let model = served::checked(saved)?;
    let batch_tokens = args.batch_tokens.map(|n| n as usize);
    let pool = Pool::open(saved, &model, &args.ep, job.threads(), batch_tokens, job.say)?;
    let settings = json!({
        "model_sha256": checkpoint::file_hash(&model)?,
        "columns": [&args.texts.text_column, &args.texts.text_pair_column],
        "provider": pool.provider().name(),
        "logits": args.logits,
        "max_length": max_length,
        "batch_tokens": pool.batch_tokens(),
    });
    let (columns, tokenizer) = (args.texts.columns(), saved.tokenizer.clone());
    let make = Box::new(move |row: &Row| {
        let (text, pair) = TextColumns::read(&columns, row)?;
        match tokenizer.encode(&text, pair.as_deref(), max_length) {
            Ok(encoding) if encoding.is_empty() => Err(row.bad("the text has no tokens")),
            encoding => encoding.map_err(|error| row.bad(format!("{error:#}"))),
        }
    });
    let work = Classify { task, pool, with_logits: args.logits };
    job.answer(work, make, job.window(WINDOW), settings)
}

impl Work for Classify<'_> {
    type Item = Encoding;

    fn provider(&self) -> Provider {
        self.pool.provider()
    }

    fn answers(&mut self, encodings: &[&Encoding], progress: &mut Progress) -> Result<Vec<Answer>> {
        let answer = |row: Vec<f32>| {
            if row.iter().all(|x| x.is_finite()) {
                Ok(self.task.prediction(&row, self.with_logits))
            } else {
                Err(format!("the model's logits are not finite: {row:?}"))
            }
        };
        let outputs = self.pool.outputs(encodings)?;
        let answers =
            outputs.iter().map(|outputs| Ok(answer(self.task.logits(outputs)?))).collect::<Result<_>>()?;
        progress.tokens += encodings.iter().map(|encoding| encoding.len()).sum::<usize>();
        progress.truncated += encodings.iter().filter(|encoding| encoding.truncated).count();
        Ok(answers)
    }
}
