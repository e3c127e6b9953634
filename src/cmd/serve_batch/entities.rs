//! Texts, or words, → entities.

use serde_json::json;

use super::{Answer, Job, Progress, Work};
use crate::data::batch::Encoding;
use crate::data::records::Row;
use crate::runtime::Provider;
use crate::saved::Saved;
use crate::serve::{Pool, served};
use crate::task::TokenClassification;
use crate::task::token_classification::{self, AnswerFlags, Question};
use crate::{Result, bail_unusable, checkpoint};

/// Records that are sorted by length and batched together.
const WINDOW: u64 = 4096;

struct Entities<'a> {
    task: &'a TokenClassification,
    pool: Pool,
    flags: AnswerFlags,
}

/// Finds the entities of every record.
pub(super) fn run(job: &Job, saved: &Saved, task: &TokenClassification) -> Result<()> {
    let args = job.args;
    job.refuse_generation(saved.task.name())?;
    if args.logits {
        bail_unusable!("--logits is for text-classification; this is a token-classification model");
    }
    let max_length = saved.checked_max_length(args.max_length)?;
    let model = served::checked(saved)?;
    let batch_tokens = args.batch_tokens.map(|n| n as usize);
    let pool = Pool::open(saved, &model, &args.ep, job.threads(), batch_tokens, job.say)?;
    let flags = args.entities;
    let settings = json!({
        "model_sha256": checkpoint::file_hash(&model)?,
        "columns": [&args.texts.text_column, &args.tokens_column],
        "provider": pool.provider().name(),
        "answer": [
            json!(flags.aggregation.unwrap_or_default()),
            json!(flags.offset_unit.unwrap_or_default()),
            json!(flags.tags),
        ],
        "max_length": max_length,
        "batch_tokens": pool.batch_tokens(),
    });
    let columns = args.texts.columns().with("tokens", args.tokens_column.clone());
    let tokenizer = saved.tokenizer.clone();
    let make =
        Box::new(move |row: &Row| token_classification::question(row, &columns, &tokenizer, max_length));
    job.answer(Entities { task, pool, flags }, make, job.window(WINDOW), settings)
}

impl Work for Entities<'_> {
    type Item = (Vec<Encoding>, Question);

    fn provider(&self) -> Provider {
        self.pool.provider()
    }

    fn answers(&mut self, items: &[&Self::Item], progress: &mut Progress) -> Result<Vec<Answer>> {
        let encodings: Vec<&Encoding> = items.iter().flat_map(|(windows, _)| windows).collect();
        progress.tokens += encodings.iter().map(|encoding| encoding.len()).sum::<usize>();
        let outputs = self.pool.outputs(&encodings)?;
        let mut rest = &outputs[..];
        let mut answers = Vec::with_capacity(items.len());
        for (windows, question) in items {
            let (own, others) = rest.split_at(windows.len());
            answers.push(self.task.answer(question, own, &self.flags)?);
            rest = others;
        }
        Ok(answers)
    }
}
