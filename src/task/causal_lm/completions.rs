//! Prompts of records → the texts that a model puts behind them → how much these have of the completions.

use super::metrics::{ChrF, rouge_l};
use super::{CausalLm, Document, documents};
use crate::Result;
use crate::data::records::Files;
use crate::generate::{Ends, Engine, GenerationConfig, Limits, Prompts};
use crate::runtime::Slots;
use crate::saved::Saved;
use crate::say::Say;
use crate::task::{Metrics, RecordFlags};

/// Prompts, each with the completion that is wanted behind it, and how they are gone on with.
pub struct Completions<'a> {
    pub saved: &'a Saved,
    pub lm: &'a CausalLm,
    /// Where the records stand.
    pub files: &'a Files,
    pub documents: Vec<Document>,
    /// Tokens of a prompt and its text, at most.
    pub positions: usize,
    /// Tokens of a text, at most; where nobody says it, as many as [`GenerationConfig`] has.
    pub max_new_tokens: Option<usize>,
}

impl Completions<'_> {
    /// Generates a text for each prompt, the likeliest token at every place, and measures `rouge_l`, the mean over the
    /// records, and `chrf`, that of all texts together; both from 0 to 100. Of a prompt that leaves too little room the front
    /// is cut.
    ///
    /// # Errors
    /// Unusable: a prompt that can't be gone on with, or that takes too much memory. As [`Engine::run`].
    pub fn measure(&self, slots: Slots, say: Say) -> Result<Metrics> {
        let Self { saved, lm, files, documents, positions, max_new_tokens } = self;
        let mut settings = GenerationConfig::default();
        settings.max_new_tokens = max_new_tokens.unwrap_or(settings.max_new_tokens);
        let ends = Ends::of(&saved.dir, lm)?;
        let prompts = Prompts::new(saved, lm, &ends, *positions, true)?;
        let request = |document: &Document| {
            let prompt = prompts.request(document.prompt.as_deref().unwrap_or_default(), settings.clone());
            prompt.map(|prompt| prompt.request).map_err(|error| error.context(files.at(document.place)))
        };
        let requests = documents.iter().map(request).collect::<Result<Vec<_>>>()?;
        let limits = Limits::of(None, None)?;
        let mut engine = Engine::new(slots, saved.tokenizer.inner(), ends.ends, *positions, limits);
        let bar = say.bar(requests.len() as u64, "{bar:24} {pos}/{len} texts  {eta} left")?;
        let texts = engine.run(&requests, &mut |news| {
            bar.inc(u64::from(news.last));
            Ok(())
        })?;
        bar.finish_and_clear();
        anyhow::ensure!(
            texts.len() == documents.len(),
            "{} texts for {} prompts",
            texts.len(),
            documents.len()
        );
        let (mut rouge, mut chrf) = (0.0, ChrF::default());
        for (document, found) in documents.iter().zip(&texts) {
            let found = found.first().map(|found| found.text.as_str()).unwrap_or_default();
            rouge += rouge_l(&document.text, found);
            chrf.add(&document.text, found);
        }
        let rouge = rouge / documents.len() as f64;
        Ok(Metrics::from([("rouge_l".to_owned(), rouge), ("chrf".to_owned(), chrf.score())]))
    }
}

impl CausalLm {
    /// The records that have a prompt. None of what can be read only once, such as a pipe: that is said.
    ///
    /// # Errors
    /// Unusable: as of reading the records to measure on.
    pub fn prompted(files: &Files, flags: &RecordFlags, say: Say) -> Result<Vec<Document>> {
        if !files.paths().iter().all(|path| path.is_file()) {
            say.line(
                "rouge_l and chrf are not measured: they need a second look at the records; give a file",
            );
            return Ok(Vec::new());
        }
        let mut documents = documents::read(files, flags)?;
        documents.retain(|document| document.prompt.is_some());
        Ok(documents)
    }
}
