//! Prompts of records → the texts that a model puts behind them → how much these have of the completions.

use super::metrics::{ChrF, rouge_l};
use super::{CausalLm, Document, documents};
use crate::Result;
use crate::data::records::Files;
use crate::generate::{Ends, Engine, GenerationConfig, Limits, Prompt, Prompts, Request};
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
    /// records, and `chrf`, that of all texts together; both from 0 to 100. As where losses are measured, the front of a
    /// prompt is cut that leaves its completion no room, and that is said.
    ///
    /// # Errors
    /// Unusable: a prompt that can't be gone on with, or that takes too much memory. As [`Engine::run`].
    pub fn measure(&self, slots: Slots, say: Say) -> Result<Metrics> {
        let Self { saved, documents, positions, .. } = self;
        let ends = Ends::of(&saved.dir, self.lm)?;
        let requests = self.requests(&ends, say)?;
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

    /// What the engine is asked for.
    fn requests(&self, ends: &Ends, say: Say) -> Result<Vec<Request>> {
        let Self { saved, positions, .. } = self;
        let prompts = Prompts::new(saved, self.lm, ends, *positions, true)?;
        let settings = GenerationConfig::default();
        let most = self.max_new_tokens.unwrap_or(settings.max_new_tokens);
        let request = |document: &Document| -> Result<Prompt> {
            let wanted = saved.tokenizer.body(&document.text)?.ids.len();
            let room = wanted.clamp(1, most.min(positions / 2).max(1));
            let with_room = GenerationConfig { max_new_tokens: room, ..settings.clone() };
            let mut prompt = prompts.request(document.prompt.as_deref().unwrap_or_default(), with_room)?;
            prompt.request.settings.max_new_tokens = most; // a text may be longer than what is wanted
            Ok(prompt)
        };
        let placed = |document| request(document).map_err(|e| e.context(self.files.at(document.place)));
        let prompts = self.documents.iter().map(placed).collect::<Result<Vec<_>>>()?;
        let (cut, all) = (prompts.iter().filter(|prompt| prompt.truncated).count(), prompts.len());
        if cut > 0 {
            say.warn(format!("{cut} of {all} prompts are cut in front, to leave room for a text"));
        }
        Ok(prompts.into_iter().map(|prompt| prompt.request).collect())
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
