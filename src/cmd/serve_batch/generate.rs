//! Prompts → texts.

use serde_json::{Map, Value, json};

use super::{BatchRun, ServeProgress, Work};
use crate::data::records::{BadRow, Columns, Row};
use crate::generate::{self, Ends, Engine, Generated, GenerationConfig, Prompt, Prompts, Request, fields};
use crate::predict::graphs;
use crate::runtime::{Provider, Slots};
use crate::saved::Saved;
use crate::task::{Answer, CausalLm, Objective};
use crate::{Result, bail_unusable, checkpoint};

/// Prompts that are answered before any of their texts is written: what a run that is killed loses.
const WINDOW: u64 = 256;

struct Generate<'a> {
    engine: Engine<'a>,
    provider: Provider,
    cache_mb: usize,
}

/// Generates for every record.
pub(super) fn run(job: &BatchRun, saved: &Saved, task: &CausalLm) -> Result<()> {
    let args = job.args;
    let flags = &args.flags.causal_lm.generation;
    if args.batch_tokens.is_some() {
        bail_unusable!(
            "--batch-tokens says nothing to {}: --slots bounds what is generated side by side",
            CausalLm::NAME
        );
    }
    let providers = generate::providers(&args.ep, args.precision, job.say)?;
    let (base, limits) = (flags.settings(args.flags.shared.top_k)?, flags.limits()?);
    // what training cut texts at doesn't bound what is written
    let positions = saved.checked_max_length(args.max_length.or(Some(saved.config.max_positions())))?;
    let ends = Ends::of(&saved.dir, task)?;
    let prompts = Prompts::new(saved, task, &ends, positions, flags.truncates())?;
    let model = graphs::checked_generating(saved, args.precision)?;
    let slots = Slots::open(&model, &providers, job.threads(), job.say)?;
    let provider = slots.provider();
    let settings = json!({
        "model_sha256": checkpoint::file_hash(&model)?,
        "provider": provider.name(),
        "weights_sha256": crate::onnx::write::metadata(&model)?.get("weights_sha256"),
        "max_length": positions,
        "ends": ends.ends,
        "start": ends.start,
    });
    let columns = saved.task.columns(&args.flags);
    let reader = Reader { prompts, columns: columns.clone(), base };
    let engine = Engine::new(slots, saved.tokenizer.inner(), ends.ends, positions, limits);
    let work = Generate { engine, provider, cache_mb: limits.cache_bytes >> 20 };
    job.answer(work, Box::new(move |row| reader.prompt(row)), columns, job.window(WINDOW), settings)
}

/// Makes requests of records.
struct Reader {
    prompts: Prompts,
    columns: Columns,
    base: GenerationConfig,
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
        // each record draws numbers of its own, unless it has a seed of its own
        let base = GenerationConfig { record: row.line as u64, ..self.base.clone() };
        let prompt = base.with(&fields).and_then(|settings| self.prompts.request(text, settings));
        prompt.map_err(|error| row.bad(format!("{error:#}")))
    }
}

impl Work for Generate<'_> {
    type Item = Prompt;

    fn provider(&self) -> Provider {
        self.provider
    }

    fn answers(&mut self, prompts: &[&Prompt], progress: &mut ServeProgress) -> Result<Vec<Answer>> {
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
            let mut fields = texts.next().map(|texts| record(&texts)).unwrap_or_default();
            if prompt.truncated {
                fields.insert("truncated".to_owned(), json!(true));
            }
            Ok(fields)
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
