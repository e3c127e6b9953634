//! Prompts → texts.

use serde_json::{Map, Value, json};

use super::{Answer, Job, Progress, Work};
use crate::cmd::generation::{fields, on_cpu};
use crate::data::records::{BadRow, Columns, Row};
use crate::data::tokens::Tokenizer;
use crate::generate::{Engine, Generated, Request, Settings};
use crate::runtime::{Provider, Slots};
use crate::saved::Saved;
use crate::serve::served;
use crate::task::CausalLm;
use crate::{Result, bail_unusable, checkpoint};

/// Prompts that are answered before any of their texts is written: what a run that is killed loses.
const WINDOW: u64 = 256;

struct Generate<'a> {
    engine: Engine<'a>,
    cache_mb: usize,
}

/// A record's request, and whether its prompt was cut.
struct Prompt {
    request: Request,
    truncated: bool,
}

/// Generates for every record.
pub(super) fn run(job: &Job, saved: &Saved, task: &CausalLm) -> Result<()> {
    let args = job.args;
    for (given, flag) in [
        (args.logits, "--logits"),
        (args.batch_tokens.is_some(), "--batch-tokens"),
        (args.texts.text_column.is_some(), "--text-column"),
        (args.texts.text_pair_column.is_some(), "--text-pair-column"),
    ] {
        if given {
            bail_unusable!("{flag} is for text-classification; this is a causal-lm model");
        }
    }
    on_cpu(&args.ep)?;
    let (base, limits) = (args.generation.settings()?, args.generation.limits()?);
    let positions = saved.checked_max_length(args.max_length)?;
    let model = served::checked_generating(saved, args.precision)?;
    let slots = Slots::open(&model, job.threads(), job.say)?;
    let settings = json!({
        "model_sha256": checkpoint::file_hash(&model)?,
        "weights_sha256": crate::onnx::write::metadata(&model)?.get("weights_sha256"),
        "prompt_column": args.prompt_column,
        "generation": args.generation.given()?,
        "max_length": positions,
    });
    let reader = Reader {
        tokenizer: saved.tokenizer.clone(),
        columns: Columns::default().with("prompt", args.prompt_column.clone()),
        base,
        positions,
        truncates: args.generation.truncates(),
        start: task.end,
    };
    let engine = Engine::new(slots, saved.tokenizer.inner(), task.end, positions, limits);
    let work = Generate { engine, cache_mb: limits.cache_bytes >> 20 };
    job.answer(work, Box::new(move |row| reader.prompt(row)), job.window(WINDOW), settings)
}

/// Makes requests of records.
struct Reader {
    tokenizer: Tokenizer,
    columns: Columns,
    base: Settings,
    positions: usize,
    truncates: bool,
    /// What a text begins with where there is no prompt.
    start: u32,
}

impl Reader {
    fn prompt(&self, row: &Row) -> Result<Prompt, BadRow> {
        let text = match row.get(&self.columns, "prompt") {
            None if row.fields.len() == 1 && row.fields.contains_key("text") => {
                row.text(&Columns::default(), "text")? // a text a line
            }
            _ => row.text(&self.columns, "prompt")?,
        };
        let mut fields = row.fields.clone();
        fields.retain(|_, value| value != ""); // a cell that is left empty
        let settings = self.base.with(&fields).map_err(|error| row.bad(format!("{error:#}")))?;
        let encoding = self.tokenizer.encode(text, None, usize::MAX);
        let mut prompt = encoding.map_err(|error| row.bad(format!("{error:#}")))?.ids;
        if prompt.is_empty() {
            prompt.push(self.start);
        }
        let most = self.positions - 1;
        let truncated = prompt.len() > most;
        if truncated && !self.truncates {
            return Err(row.bad(format!(
                "the prompt has {} tokens, and {most} leave room for a new one; --truncate-prompt cuts its front",
                prompt.len()
            )));
        }
        prompt.drain(..prompt.len().saturating_sub(most));
        Ok(Prompt { request: Request { prompt, settings }, truncated })
    }
}

impl Work for Generate<'_> {
    type Item = Prompt;

    fn provider(&self) -> Provider {
        Provider::Cpu
    }

    fn answers(&mut self, prompts: &[&Prompt], progress: &mut Progress) -> Result<Vec<Answer>> {
        let fits = |prompt: &&&Prompt| self.engine.fits(&prompt.request);
        let requests: Vec<Request> =
            prompts.iter().filter(fits).map(|prompt| prompt.request.clone()).collect();
        let texts = self.engine.run(&requests, &mut |news| {
            progress.tokens += news.tokens;
            progress.show();
            Ok(())
        })?;
        let (asked, given) = (requests.len(), texts.len());
        anyhow::ensure!(asked == given, "{given} texts for {asked} prompts");
        let mut texts = texts.into_iter();
        let mut answer = |prompt: &&Prompt| {
            if !self.engine.fits(&prompt.request) {
                return Err(format!(
                    "the prompt and its text take more than --cache-mb {}: give more, or fewer --max-new-tokens",
                    self.cache_mb
                ));
            }
            Ok(texts.next().map(|texts| record(&texts)).unwrap_or_default())
        };
        progress.truncated += prompts.iter().filter(|prompt| prompt.truncated).count();
        Ok(prompts.iter().map(&mut answer).collect())
    }
}

/// A text's fields; several texts stand in a list.
fn record(texts: &[Generated]) -> Map<String, Value> {
    match texts {
        [one] => fields(one),
        several => Map::from_iter([("texts".to_owned(), several.iter().map(fields).collect())]),
    }
}
