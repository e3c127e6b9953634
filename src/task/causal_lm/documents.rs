//! Texts, prompts and completions → examples of a length that a model takes.

use serde::{Deserialize, Serialize};

use super::{CausalLm, NextTokens};
use crate::data::batch::Encoding;
use crate::data::cache::Key;
use crate::data::records::{self, Files, Place};
use crate::data::tokens::{Body, Tokenizer};
use crate::task::{Example, Objective, RecordFlags, Target, listed};
use crate::{Result, bail_unusable};

/// How documents become examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cutting {
    /// A long text is cut into parts, each of which begins with the last token of the one before it: so every token
    /// but the first of a text is predicted once. Of a prompt that is too long for its completion the front is left
    /// out, and a completion that is too long alone is cut.
    Training,
    /// The same, and a completion that is too long is cut into such parts too: nothing goes unmeasured.
    Evaluation,
    /// Documents one after another, cut wherever `max_length` falls.
    Concatenated,
}

/// A document's tokens, or those of several, before they are cut.
#[derive(Default, Serialize, Deserialize)]
struct Whole {
    /// (T)
    ids: Vec<u32>,
    /// (T): the bytes of text that each stands for.
    bytes: Vec<usize>,
    /// (T)
    predicted: Vec<bool>,
    /// The first one that is predicted.
    first: usize,
    /// How many in front stay where the front is cut: those that the tokenizer puts there, or the start.
    kept: usize,
    prompted: bool,
    /// It has no token of a text.
    empty: bool,
}

impl Whole {
    fn extend(&mut self, ids: &[u32], bytes: Option<&[usize]>) {
        self.ids.extend(ids);
        match bytes {
            Some(bytes) => self.bytes.extend(bytes),
            None => self.bytes.resize(self.ids.len(), 0),
        }
    }

    /// Leaves out so many tokens of the prompt's front; true, for something is lost.
    fn forget(&mut self, count: usize) -> bool {
        let range = self.kept..self.kept + count;
        self.ids.drain(range.clone());
        self.bytes.drain(range.clone());
        self.predicted.drain(range);
        self.first -= count;
        true
    }

    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.bytes.truncate(length);
        self.predicted.truncate(length);
    }

    /// Cuts it into examples that overlap by one token, less those that have nothing to predict.
    fn cut(&self, max_length: usize, truncated: bool, examples: &mut Vec<Example<NextTokens>>) {
        let before = examples.len();
        for start in (0..self.ids.len().saturating_sub(1)).step_by(max_length - 1) {
            let part = start..self.ids.len().min(start.saturating_add(max_length));
            let mut predicted = self.predicted[part.clone()].to_vec();
            predicted[0] = false; // nothing stands before it
            if !predicted.contains(&true) {
                continue;
            }
            let of_predicted = self.bytes[part.clone()].iter().zip(&predicted);
            let bytes = of_predicted.map(|(&bytes, &predicted)| if predicted { bytes } else { 0 }).sum();
            let truncated = truncated && examples.len() == before;
            let (ids, type_ids) = (self.ids[part.clone()].to_vec(), vec![0; part.len()]);
            examples.push(Example {
                encoding: Encoding { ids, type_ids, truncated },
                target: NextTokens { predicted, bytes },
            });
        }
    }
}

/// What is learnt from: a text, or what follows a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Where it begins.
    pub place: Place,
    pub prompt: Option<String>,
    pub text: String,
}

impl Document {
    /// Texts without prompts.
    pub fn of_texts<'t>(texts: impl IntoIterator<Item = &'t str>) -> Vec<Self> {
        let document = |(i, text): (usize, &str)| Self {
            place: Place { file: 0, line: i + 1 },
            prompt: None,
            text: text.to_owned(),
        };
        texts.into_iter().enumerate().map(document).collect()
    }
}

/// Reads every text, or every prompt with its completion.
///
/// # Errors
/// Unusable: the file can't be read, has no records, or has records without text; the first of them are listed with
/// file and line.
pub(super) fn read(files: &Files, flags: &RecordFlags) -> Result<Vec<Document>> {
    let (how, columns) = CausalLm::reading(flags);
    records::read_examples(files, &how, |row| {
        let prompt = row.optional_text(&columns, "prompt")?.map(str::to_owned);
        let name = if prompt.is_some() { "completion" } else { "text" };
        Ok(Document { place: row.place(), prompt, text: row.text(&columns, name)?.to_owned() })
    })
}

impl CausalLm {
    /// The built-in pages as examples to measure on.
    ///
    /// # Errors
    /// As [`CausalLm::examples_of`].
    pub fn builtin_examples(&self, tokenizer: &Tokenizer, max_length: usize) -> Result<Vec<Example>> {
        let english = Document::of_texts(crate::data::english());
        let examples = self.examples_of(&english, tokenizer, max_length, Cutting::Evaluation)?;
        Ok(listed(examples, Target::CausalLm))
    }

    /// Documents that were read from `files` as examples.
    ///
    /// # Errors
    /// Unusable: none has a token that could be predicted; as [`CausalLm::examples_of`].
    pub(super) fn examples_of_file(
        &self,
        documents: &[Document],
        files: &Files,
        tokenizer: &Tokenizer,
        max_length: usize,
        cutting: Cutting,
    ) -> Result<Vec<Example<NextTokens>>> {
        let examples = self.examples_of(documents, tokenizer, max_length, cutting)?;
        if examples.is_empty() {
            bail_unusable!("{files}: no text has a token that could be predicted");
        }
        Ok(examples)
    }

    /// Documents as examples of at most `max_length` tokens. A document is what the tokenizer gives for it, with the
    /// tokens that it puts around a text, and ends with one of `ends`; between a prompt and its completion stands
    /// nothing. Predicted is every token of a text that another stands in front of, and the completion of a prompt.
    ///
    /// # Errors
    /// Unusable: a `max_length` that has no room for a token to predict.
    pub fn examples_of(
        &self,
        documents: &[Document],
        tokenizer: &Tokenizer,
        max_length: usize,
        cutting: Cutting,
    ) -> Result<Vec<Example<NextTokens>>> {
        let around = tokenizer.around()?;
        let least = around.0.len().max(1) + 1;
        if max_length < least {
            bail_unusable!(
                "a maximum length of {max_length} has no room for a token that could be predicted: {least} at least"
            );
        }
        let whole = |document: &Document| {
            let prompt = tokenizer.body(document.prompt.as_deref().unwrap_or(""))?;
            anyhow::Ok(self.whole(document, &prompt, tokenizer.body(&document.text)?, &around))
        };
        let of = format!("{} {:?} {:?}", Self::NAME, self.start, self.ends);
        let own = |document: &Document, key: &mut Key| {
            key.add(document.prompt.as_deref());
            key.add(Some(&document.text));
        };
        let mut examples = Vec::new();
        if cutting == Cutting::Concatenated {
            let mut all = Whole::default();
            tokenizer.in_order(&of, documents, own, whole, |_, whole| {
                self.join(&mut all, whole?);
                Ok(())
            })?;
            all.cut(max_length, false, &mut examples);
            return Ok(examples);
        }
        tokenizer.in_order(&of, documents, own, whole, |_, whole| {
            let mut whole = whole?;
            if whole.empty {
                return Ok(());
            }
            let mut truncated = false;
            if whole.prompted && whole.ids.len() > max_length {
                let completion = whole.ids.len() - whole.first;
                // a token of the prompt at least stands in front of the completion
                let room = max_length.saturating_sub(completion).max(whole.kept + 1);
                if room >= whole.first {
                    // all of it stands in front of the first window
                } else if room + completion <= max_length || cutting == Cutting::Training {
                    truncated |= whole.forget(whole.first - room);
                } else if whole.first >= max_length {
                    truncated |= whole.forget(whole.first - (max_length / 2).max(whole.kept + 1));
                }
                if cutting == Cutting::Training && whole.ids.len() > max_length {
                    whole.truncate(max_length);
                    truncated = true;
                }
            }
            whole.cut(max_length, truncated, &mut examples);
            Ok(())
        })?;
        Ok(examples)
    }

    /// A document's tokens, uncut.
    fn whole(&self, document: &Document, prompt: &Body, text: Body, around: &(Vec<u32>, Vec<u32>)) -> Whole {
        let (before, behind) = around;
        let mut whole = Whole {
            empty: document.prompt.is_none() && text.ids.is_empty(),
            prompted: document.prompt.is_some(),
            ..Whole::default()
        };
        whole.extend(before, None);
        if document.prompt.as_deref() == Some("") && before.is_empty() {
            whole.extend(self.start.as_slice(), None);
        }
        whole.kept = whole.ids.len();
        whole.extend(&prompt.ids, None);
        let shown = whole.ids.len();
        whole.first = if whole.prompted { shown.max(1) } else { 1 };
        whole.extend(&text.ids, Some(&text.bytes));
        whole.extend(behind, None);
        let ended = whole.ids[shown..].last().is_some_and(|last| self.ends.contains(last));
        if !ended {
            whole.extend(&self.ends[..self.ends.len().min(1)], None);
        }
        whole.predicted = (0..whole.ids.len()).map(|i| i >= whole.first).collect();
        whole
    }

    /// Puts a document behind all others: its tokens then see those of the document before. Where it begins with the end
    /// token, that of the one before is it.
    fn join(&self, all: &mut Whole, mut whole: Whole) {
        if !whole.prompted {
            whole.predicted.fill(true);
        }
        let starts = whole.kept > 0 && whole.ids.first() == all.ids.last();
        let skipped = usize::from(starts && whole.ids.first().is_some_and(|id| self.ends.contains(id)));
        all.ids.extend(&whole.ids[skipped..]);
        all.bytes.extend(&whole.bytes[skipped..]);
        all.predicted.extend(&whole.predicted[skipped..]);
    }
}
