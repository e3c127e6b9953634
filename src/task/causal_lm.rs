//! Causal language modelling: every token of a text from those before it.

use serde_json::{Value, json};

use super::{Dim, Example, Form, Metrics, Output, Target};
use crate::data::batch::Encoding;
use crate::data::tokens::Tokenizer;
use crate::model::ops::{Ops, Pick};
use crate::model::{Family, ModelConfig, heads, manifest};
use crate::{Result, bail_unusable, unusable};

/// A model of the next token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalLm {
    /// V, the scores of a token.
    pub vocabulary: usize,
    /// The token that ends a text.
    pub end: u32,
}

/// What is measured, beside the loss.
pub(super) const METRICS: &[&str] = &["bits_per_byte", "perplexity"];

/// Which of an example's tokens are learnt to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Next {
    /// (T). The first token is never predicted: nothing stands before it.
    pub predicted: Vec<bool>,
    /// The bytes of text that the predicted tokens stand for.
    pub bytes: usize,
}

impl Next {
    /// How many tokens are predicted.
    pub fn count(&self) -> usize {
        self.predicted.iter().filter(|&&predicted| predicted).count()
    }
}

/// What is learnt from: a text, or what follows a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The line of the file.
    pub line: usize,
    pub prompt: Option<String>,
    pub text: String,
}

impl Document {
    /// Texts, each to be learnt from its second token on.
    pub fn of_texts<'t>(texts: impl IntoIterator<Item = &'t str>) -> Vec<Self> {
        let document = |(i, text): (usize, &str)| Self { line: i + 1, prompt: None, text: text.to_owned() };
        texts.into_iter().enumerate().map(document).collect()
    }
}

impl CausalLm {
    /// What the model predicts, and where it ends.
    ///
    /// # Errors
    /// The family predicts no next token, or no token of the model's ends a text.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        manifest::manifest(|o| heads::causal_lm(o, &config.family, None).map(drop))?;
        if config.raw.get("tie_word_embeddings").and_then(Value::as_bool) == Some(false) {
            bail_unusable!(
                "tie_word_embeddings is false; tk's head shares the weight of the word embeddings"
            );
        }
        let vocabulary = config.vocab_size();
        let end = config.raw.get("eos_token_id").and_then(Value::as_u64).unwrap_or(50_256);
        if end as usize >= vocabulary {
            return Err(unusable!(
                "eos_token_id is {end}, the token that ends a text, and vocab_size is {vocabulary}: set it in config.json"
            ));
        }
        Ok(Self { vocabulary, end: end as u32 })
    }

    pub(super) fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        heads::causal_lm(o, family, None)
    }

    pub(super) fn generate<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        heads::causal_lm(o, family, Some(Pick::Last))
    }

    pub(super) fn outputs(&self, form: Form) -> Vec<Output> {
        let tokens = if form == Form::InPlace { Dim::Asked } else { Dim::Sequence };
        vec![Output { name: "logits", dims: vec![Dim::Batch, tokens, Dim::Of(self.vocabulary)] }]
    }

    pub(super) fn write_config(&self, config: &mut ModelConfig) {
        config.raw.insert("architectures".to_owned(), json!(["GPT2LMHeadModel"]));
        config.raw.insert("eos_token_id".to_owned(), json!(self.end));
    }

    /// Documents as examples of at most `max_length` tokens, each ended by the end token. A long text is cut into
    /// parts, each of which begins with the last token of the one before it: so every token but the first of a text
    /// is predicted once. Of a prompt that is too long for its completion the front is left out.
    pub fn examples(
        &self,
        documents: &[Document],
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Vec<Example>> {
        let texts: Vec<(&str, Option<&str>)> = documents
            .iter()
            .flat_map(|document| {
                [(document.prompt.as_deref().unwrap_or(""), None), (document.text.as_str(), None)]
            })
            .collect();
        let encodings = tokenizer.encode_all(&texts, usize::MAX)?;
        let mut examples = Vec::new();
        for pair in encodings.chunks_exact(2) {
            let (prompt, mut ids) = (&pair[0].ids, pair[1].ids.clone());
            ids.push(self.end);
            if prompt.is_empty() {
                let stride = (max_length - 1).max(1);
                let parts = (ids.len() - 1).div_ceil(stride);
                for part in 0..parts {
                    let start = part * stride;
                    let ids = &ids[start..(start + max_length).min(ids.len())];
                    examples.push(self.example(tokenizer, ids, 1, false));
                }
                continue;
            }
            let room = max_length.saturating_sub(ids.len()).max(1); // a token at least stands before the completion
            let kept = &prompt[prompt.len().saturating_sub(room)..];
            let mut all = [kept, &ids].concat();
            let truncated = kept.len() < prompt.len() || all.len() > max_length;
            all.truncate(max_length);
            examples.push(self.example(tokenizer, &all, kept.len(), truncated));
        }
        Ok(examples)
    }

    /// Documents one after another, cut into examples of `max_length` tokens wherever that falls: tokens then see
    /// those of the document before theirs.
    pub fn concatenated(
        &self,
        documents: &[Document],
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Vec<Example>> {
        let texts: Vec<(String, Option<String>)> = documents
            .iter()
            .map(|document| (document.prompt.clone().unwrap_or_default() + &document.text, None))
            .collect();
        let mut ids = Vec::new();
        for encoding in tokenizer.encode_all(&texts, usize::MAX)? {
            ids.extend(encoding.ids);
            ids.push(self.end);
        }
        let stride = (max_length - 1).max(1);
        let starts = (0..ids.len().saturating_sub(1)).step_by(stride);
        Ok(starts
            .map(|start| {
                let part = &ids[start..(start + max_length).min(ids.len())];
                self.example(tokenizer, part, 1, false)
            })
            .collect())
    }

    /// An example whose tokens from `first` on are predicted.
    fn example(&self, tokenizer: &Tokenizer, ids: &[u32], first: usize, truncated: bool) -> Example {
        let predicted: Vec<bool> = (0..ids.len()).map(|i| i >= first).collect();
        let bytes = ids[first..].iter().map(|&id| tokenizer.bytes(id)).sum();
        Example {
            encoding: Encoding { ids: ids.to_vec(), type_ids: vec![0; ids.len()], truncated },
            target: Target::Next(Next { predicted, bytes }),
        }
    }

    /// Each token's target: the token behind it, where that is to be predicted. (T), of a whole packed batch.
    pub fn targets(examples: &[&Encoding], targets: &[&Target]) -> Vec<Option<u32>> {
        let mut wanted = Vec::new();
        for (encoding, target) in examples.iter().zip(targets) {
            let Target::Next(next) = target else { continue };
            let behind = encoding.ids.iter().zip(&next.predicted).skip(1);
            wanted.extend(behind.map(|(&id, &predicted)| predicted.then_some(id)));
            wanted.push(None);
        }
        wanted
    }

    /// The metrics of predicted tokens: mean loss in nats a token, perplexity, and bits a byte of text.
    pub fn measured(losses: f64, targets: &[&Target]) -> Metrics {
        let nexts = || {
            targets
                .iter()
                .filter_map(|target| if let Target::Next(next) = target { Some(next) } else { None })
        };
        let tokens: usize = nexts().map(Next::count).sum();
        let bytes: usize = nexts().map(|next| next.bytes).sum();
        let loss = losses / tokens as f64;
        Metrics::from([
            ("loss".to_owned(), loss),
            ("perplexity".to_owned(), loss.exp()),
            ("bits_per_byte".to_owned(), losses / std::f64::consts::LN_2 / bytes as f64),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LM: CausalLm = CausalLm { vocabulary: 300, end: 299 };

    /// Every byte is a token, so ids are easy to read.
    fn tokenizer() -> Tokenizer {
        Tokenizer::train(&["x"], 257).unwrap()
    }

    fn document(prompt: Option<&str>, text: &str) -> Document {
        Document { line: 1, prompt: prompt.map(str::to_owned), text: text.to_owned() }
    }

    /// Each example's text, with `|` for the end and a capital for a token that is predicted.
    fn shown(examples: &[Example], tokenizer: &Tokenizer) -> Vec<String> {
        let token = |(&id, &predicted): (&u32, &bool)| {
            let text = if id == LM.end { "|".to_owned() } else { tokenizer.inner().id_to_token(id).unwrap() };
            if predicted { text.to_uppercase() } else { text }
        };
        examples
            .iter()
            .map(|example| {
                let Target::Next(next) = &example.target else { panic!() };
                example.encoding.ids.iter().zip(&next.predicted).map(token).collect()
            })
            .collect()
    }

    #[test]
    fn every_token_but_a_texts_first_is_predicted_once() {
        let tokenizer = tokenizer();
        let documents =
            [document(None, "abcdefg"), document(None, ""), document(None, "xyz"), document(None, "q")];
        let examples = LM.examples(&documents, &tokenizer, 4).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["aBCD", "dEFG", "g|", "xYZ|", "q|"]);
        let joined = LM.concatenated(&documents, &tokenizer, 6).unwrap();
        assert_eq!(shown(&joined, &tokenizer), ["aBCDEF", "fG||XY", "yZ|Q|"]);
        let bytes = |example: &Example| matches!(&example.target, Target::Next(next) if next.bytes == 3);
        assert!(bytes(&examples[0]) && !bytes(&examples[2]), "the end of a text is no byte of it");
    }

    #[test]
    fn of_a_prompt_nothing_is_predicted_and_its_front_makes_room() {
        let tokenizer = tokenizer();
        let documents =
            [document(Some("abc"), "xy"), document(Some("abcdef"), "xy"), document(Some("abc"), "uvwxyz")];
        let examples = LM.examples(&documents, &tokenizer, 6).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["abcXY|", "defXY|", "cUVWXY"]);
        assert_eq!(examples.iter().map(|e| e.encoding.truncated).collect::<Vec<_>>(), [false, true, true]);
    }

    #[test]
    fn a_tokens_target_is_the_one_behind_it() {
        let tokenizer = tokenizer();
        let examples =
            LM.examples(&[document(Some("ab"), "x"), document(None, "yz")], &tokenizer, 9).unwrap();
        let (encodings, targets): (Vec<&Encoding>, Vec<&Target>) =
            examples.iter().map(|example| (&example.encoding, &example.target)).unzip();
        let id = |text: &str| tokenizer.inner().token_to_id(text);
        let expected = [None, id("x"), Some(LM.end), None, id("z"), Some(LM.end), None];
        assert_eq!(CausalLm::targets(&encodings, &targets), expected);
    }
}
