//! Prompts → requests: what stands in front of a text, which tokens end it, and what is cut.

use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value};

use super::Request;
use super::config::GenerationConfig;
use crate::data::tokens::Tokenizer;
use crate::model::token_ids;
use crate::saved::Saved;
use crate::task::CausalLm;
use crate::{Result, bail_unusable, unusable};

/// Where `transformers` keeps how a model generates.
pub const GENERATION_CONFIG: &str = "generation_config.json";

/// The tokens around generated texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Any of these ends a text. None may: then the length alone does.
    pub ends: Vec<u32>,
    /// What an empty prompt begins with.
    pub start: Option<u32>,
}

impl Ends {
    /// Those of a model's directory. Where it has a generation_config.json, that one's `eos_token_id` counts, as in
    /// `transformers`, and there none is none; else that of config.json.
    ///
    /// # Errors
    /// Unusable: generation_config.json can't be read, or names a token that the vocabulary has not.
    pub fn of(dir: &Path, lm: &CausalLm) -> Result<Self> {
        let Some(fields) = read(dir)? else { return Ok(Self { ends: lm.ends.clone(), start: lm.start }) };
        let of = || -> Result<Self> {
            token_ids::check(&fields, lm.vocabulary)?;
            let ids = |key: &str| token_ids::read(&fields, key, lm.vocabulary).map(Option::unwrap_or_default);
            Ok(Self { ends: ids("eos_token_id")?, start: ids("bos_token_id")?.first().copied().or(lm.start) })
        };
        of().with_context(|| dir.join(GENERATION_CONFIG).display().to_string())
    }
}

/// generation_config.json of a directory, where it has one.
///
/// # Errors
/// Unusable: it can't be read, or is no JSON object.
pub fn read(dir: &Path) -> Result<Option<Map<String, Value>>> {
    let path = dir.join(GENERATION_CONFIG);
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| unusable!("{} is not a JSON object: {error}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable!("{} can't be read: {error}", path.display())),
    }
}

/// Makes requests of prompts.
pub struct Prompts {
    tokenizer: Tokenizer,
    /// The tokens that the tokenizer puts in front of every text.
    before: Vec<u32>,
    start: Option<u32>,
    /// Whether an empty prompt can be gone on with.
    begins: bool,
    positions: usize,
    truncates: bool,
}

/// A request, and whether its prompt was cut.
pub struct Prompt {
    pub request: Request,
    pub truncated: bool,
}

impl Prompts {
    /// For a model whose texts have at most `positions` tokens; `truncates`: the front of a prompt is cut so that
    /// `max_new_tokens` fit behind it.
    ///
    /// # Errors
    /// As [`Tokenizer::around`]; unusable: no room for a token.
    pub fn new(saved: &Saved, lm: &CausalLm, ends: &Ends, positions: usize, truncates: bool) -> Result<Self> {
        let tokenizer = saved.tokenizer.clone();
        let before = tokenizer.around()?.0;
        let least = before.len() + 2;
        if positions < least {
            bail_unusable!(
                "a maximum length of {positions} has no room for a prompt and a new token: {least} at least"
            );
        }
        Ok(Self { tokenizer, before, start: ends.start, begins: lm.begins, positions, truncates })
    }

    /// A request for a prompt: the tokens that stand in front of every text, and its own.
    ///
    /// # Errors
    /// Unusable: the prompt is empty and the model has not learnt what a text begins with, or it leaves no room for a
    /// new token and is not to be cut.
    pub fn request(&self, text: &str, settings: GenerationConfig) -> Result<Prompt> {
        let mut prompt = self.before.clone();
        prompt.extend(self.tokenizer.body(text)?.ids);
        if prompt.is_empty() {
            if !self.begins {
                bail_unusable!(
                    "the prompt is empty, and this model was fine-tuned on texts whose first token it was never \
                     asked for, so it has not learnt what a text begins with: give a prompt, or train it with \
                     --concatenate, or on records whose prompt is empty"
                );
            }
            let Some(start) = self.start else {
                bail_unusable!(
                    "the prompt is empty, and neither bos_token_id nor eos_token_id names a token that texts begin \
                     with: give a prompt"
                );
            };
            prompt.push(start);
        }
        let most = self.positions - 1;
        if prompt.len() > most && !self.truncates {
            bail_unusable!(
                "the prompt has {} tokens, and {most} leave room for a new one; --truncate-prompt cuts its front",
                prompt.len()
            );
        }
        let room = self.positions.saturating_sub(settings.max_new_tokens).max(self.before.len() + 1);
        let truncated = self.truncates && prompt.len() > room;
        if truncated {
            prompt.drain(self.before.len()..self.before.len() + prompt.len() - room);
        }
        Ok(Prompt { request: Request { prompt, settings }, truncated })
    }
}
