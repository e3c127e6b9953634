//! Causal language modelling: every token of a text from those before it.

mod completions;
mod documents;
mod generation_config;
pub mod metrics;
#[cfg(test)]
mod tests;

use anyhow::Context;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::convert::Infallible;

pub use self::completions::Completions;
pub use self::documents::{Cutting, Document};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Metrics,
    Objective, Output, Outputs, Start,
};
use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::{Eager, Forward, X};
use crate::generate::prompt::GENERATION_CONFIG;
use crate::generate::text::TextStream;
use crate::model::ops::{Ops, Pick};
use crate::model::token_ids::{self, GPT2_END};
use crate::model::{Family, Head, ModelConfig, manifest};
use crate::runtime::Slots;
use crate::task::scores::cross_entropy;
use crate::{Result, bail_unusable, generate};

/// The key of config.json that is false where a model was fine-tuned without seeing how texts begin.
const FIRST_TOKENS: &str = "first_tokens_learnt";

/// A model of the next token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalLm {
    /// V, the scores of a token.
    pub vocabulary: usize,
    /// The tokens that end a text: `eos_token_id` of config.json, which may be a list. Training puts the first behind
    /// every text. Empty where it is `null`: then nothing ends a text.
    pub ends: Vec<u32>,
    /// What stands in front of a text that nothing else stands in front of: `bos_token_id`, or the first of `ends`.
    pub start: Option<u32>,
    /// Whether it has learnt what a text begins with, so that an empty prompt can be gone on with.
    pub begins: bool,
}

/// Which of an example's tokens are learnt to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextTokens {
    /// (T). The first token is never predicted: nothing stands before it.
    pub predicted: Vec<bool>,
    /// The bytes of text that the predicted tokens stand for.
    pub bytes: usize,
}

impl NextTokens {
    /// How many tokens are predicted.
    pub fn count(&self) -> usize {
        self.predicted.iter().filter(|&&predicted| predicted).count()
    }
}

/// Flags of texts, or of prompts and completions.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct RecordFlags {
    /// For causal-lm, the column of what stands before a completion [default: prompt].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_column: Option<String>,
    /// For causal-lm, the column of what is learnt behind a prompt [default: completion].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_column: Option<String>,
}

/// Flags of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct TrainingFlags {
    /// For causal-lm, join all texts and cut them at --max-length, so that tokens also see the text before theirs.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub concatenate: bool,
}

impl TrainingFlags {
    /// How documents to learn from become examples.
    fn learnt(&self) -> Cutting {
        if self.concatenate { Cutting::Concatenated } else { Cutting::Training }
    }
}

/// Flags of answers.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct AnswerFlags {
    /// The column of the prompt [default: prompt].
    #[arg(long, value_name = "NAME", help_heading = "Records")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_column: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub generation: generate::Flags,
}

impl Objective for CausalLm {
    const NAME: &'static str = "causal-lm";
    const PIPELINE_TAG: Option<&'static str> = Some("text-generation");
    const HEAD: Head = Head::CausalLm { wanted: None };
    const TEXTS_LEARNT: &'static [&'static str] = &["text"];
    const TEXTS_ASKED: &'static [&'static str] = &[];
    const FIELDS_ANSWERED: &'static [&'static str] = &["text", "tokens", "finish_reason"];
    const RECORD_FLAGS: &'static [&'static str] = &["--text-unit"];
    const ANSWER_FLAGS: &'static [&'static str] = &["--top-k"];
    const FILES: &'static [&'static str] = &[GENERATION_CONFIG];

    type Target = NextTokens;
    /// It answers by generating.
    type Question = Infallible;

    /// What the model predicts, and where it ends.
    ///
    /// # Errors
    /// The family predicts no next token, or no token of the model's ends a text.
    fn from_config(config: &ModelConfig) -> Result<Self> {
        manifest::manifest(|o| config.family.define(o, Self::HEAD).map(drop))?;
        if config.raw.get("tie_word_embeddings").and_then(Value::as_bool) == Some(false) {
            bail_unusable!(
                "tie_word_embeddings is false; tk's head shares the weight of the word embeddings"
            );
        }
        let vocabulary = config.vocab_size();
        token_ids::check(&config.raw, vocabulary)?;
        let ids = |key: &str| token_ids::read(&config.raw, key, vocabulary);
        let ends = match ids("eos_token_id")? {
            Some(ends) => ends,
            None if (GPT2_END as usize) < vocabulary => vec![GPT2_END],
            None => bail_unusable!(
                "eos_token_id is missing, so it is GPT-2's, {GPT2_END}, and vocab_size is {vocabulary}: \
                 set it to the token that ends a text"
            ),
        };
        let start = ids("bos_token_id")?.and_then(|start| start.first().copied()).or(ends.first().copied());
        let begins = config.raw.get(FIRST_TOKENS).and_then(Value::as_bool) != Some(false);
        Ok(Self { vocabulary, ends, start, begins })
    }

    fn write_config(&self, config: &mut ModelConfig) {
        let class = config.family.class(Self::HEAD);
        config.raw.insert("architectures".to_owned(), json!([class]));
        // a list stays one; where fields are absent, transformers takes GPT-2's
        config.raw.entry("eos_token_id").or_insert_with(|| json!(self.ends.first()));
        if let Some(start) = self.start.filter(|_| GPT2_END as usize >= self.vocabulary) {
            config.raw.entry("bos_token_id").or_insert_with(|| json!(start));
        }
        config.raw.remove(FIRST_TOKENS);
        if !self.begins {
            config.raw.insert(FIRST_TOKENS.to_owned(), json!(false));
        }
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        let own = &flags.causal_lm;
        let columns = Columns::default()
            .with("text", flags.texts.text_column.clone())
            .with("prompt", own.prompt_column.clone())
            .with("completion", own.completion_column.clone());
        (How { unit: flags.shared.text_unit, ..flags.reading.how() }, columns)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, NextTokens>> {
        let documents = documents::read(start.train, start.records)?;
        let texts = documents.iter().flat_map(|document| document.prompt.iter().chain([&document.text]));
        let texts: Vec<&str> = texts.map(String::as_str).collect();
        let (mut tokenizer, new_tokenizer) = start.tokenizer_of(&texts)?;
        let mut lm = Self::from_config(&start.config).map_err(|error| start.in_config(error))?;
        let cutting = start.training.causal_lm.learnt();
        if let (true, Some(first)) = (start.from_scratch, lm.start)
            && tokenizer.around()?.0.is_empty()
        {
            // so that first tokens are learnt, by the end of what may have stood before
            tokenizer = tokenizer.starting_with(first)?;
        }
        lm.begins = Self::shows_beginnings(&documents, &tokenizer, cutting)?;
        match lm.ends[..] {
            [] => start.say.line("eos_token_id is null, so no token is learnt to end a text"),
            [_] => {}
            [end, ..] => start
                .say
                .line(format!("texts are learnt to end by {end}, the first of eos_token_id {:?}", lm.ends)),
        }
        if TextStream::new(tokenizer.inner(), &[]).is_err() {
            start.say.warn(
                "the tokenizer is no byte-level BPE: tk generate and serve-batch will refuse this model",
            );
        }
        let config = generation_config::of_trained(start.model, &lm, new_tokenizer, start.say)?;
        let files = config.into_iter().map(|text| (GENERATION_CONFIG, text)).collect();
        let examples = lm.examples_of_file(&documents, start.train, &tokenizer, start.max_length, cutting)?;
        Ok(Learning { task: lm, tokenizer, examples, files })
    }

    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<NextTokens>>> {
        let documents = documents::read(files, encoder.records)?;
        let cutting = encoder.training.causal_lm.learnt();
        self.examples_of_file(&documents, files, encoder.tokenizer, encoder.max_length, cutting)
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        let look = |document: Document| {
            let text = document.prompt.unwrap_or_default() + &document.text;
            Look::of_text(document.place, text)
        };
        Ok(documents::read(files, flags)?.into_iter().map(look).collect())
    }

    fn beside(&self, target: &NextTokens, _: &Tokenizer) -> Beside {
        Beside::Example(format!("{} of the tokens are learnt", target.count()))
    }

    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<NextTokens>>> {
        let cutting =
            if encoder.training.causal_lm.concatenate { Cutting::Concatenated } else { Cutting::Evaluation };
        let documents = documents::read(files, encoder.records)?;
        self.examples_of_file(&documents, files, encoder.tokenizer, encoder.max_length, cutting)
    }

    fn losses(target: &NextTokens) -> Vec<usize> {
        vec![target.count()]
    }

    fn head(&self) -> Head {
        Self::HEAD
    }

    fn generate<O: Ops>(&self, o: &O, family: &Family) -> Result<Vec<O::X>> {
        family.define(o, Head::CausalLm { wanted: Some(Pick::Last) })
    }

    fn language_model(&self) -> Option<&CausalLm> {
        Some(self)
    }

    fn form(&self) -> Form {
        Form::Cached
    }

    fn outputs(&self, form: Form) -> Vec<Output> {
        let tokens = if form == Form::InPlace { Dim::Asked } else { Dim::Sequence };
        vec![Output { name: "logits", dims: vec![Dim::Batch, tokens, Dim::Of(self.vocabulary)] }]
    }

    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &NextTokens)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let scores = outputs.first().context("the model has no output")?;
        let share = 1.0 / of[0] as f32;
        Ok(vec![eager.cross_entropy(scores, &Self::targets(examples), label_smoothing as f32, share)?])
    }

    fn metrics(&self) -> &'static [Metric] {
        const { &[Metric::LOSS, Metric::falling("bits_per_byte"), Metric::falling("perplexity")] }
    }

    /// The scores of all tokens are never held.
    fn measure(&self, model: &Forward, examples: &[(&Encoding, &NextTokens)]) -> Result<Measured> {
        let (encodings, targets): (Vec<_>, Vec<_>) = examples.iter().copied().unzip();
        let losses = model.losses(&encodings, |batch| {
            Self::targets(&batch.iter().map(|&i| examples[i]).collect::<Vec<_>>())
        })?;
        Ok(Self::measured(losses, &targets).into())
    }

    fn measure_outputs(&self, _: &[Outputs], _: &[&NextTokens]) -> Result<Measured> {
        anyhow::bail!("a language model is measured by its losses")
    }

    /// Each example is read alone.
    fn measure_in_place(&self, slots: &mut Slots, examples: &[(&Encoding, &NextTokens)]) -> Result<Measured> {
        let width = slots.vocabulary();
        let mut losses = 0.0;
        for (encoding, next) in examples {
            slots.read_whole(&encoding.ids, |start, scores| {
                for (row, at) in scores.chunks_exact(width).zip(start + 1..) {
                    if next.predicted.get(at).is_some_and(|&predicted| predicted) {
                        losses += cross_entropy(row, encoding.ids[at] as usize);
                    }
                }
                Ok(())
            })?;
        }
        let targets: Vec<&NextTokens> = examples.iter().map(|(_, target)| *target).collect();
        Ok(Self::measured(losses, &targets).into())
    }

    /// Nothing stands around a prompt.
    fn check_room(&self, _: &Asking) -> Result<()> {
        Ok(())
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        Columns::default().with("prompt", flags.causal_lm.prompt_column.clone())
    }

    fn ask(&self, row: &Row, _: &Asking) -> Result<(Vec<Encoding>, Infallible), BadRow> {
        Err(row.bad("a language model answers by generating"))
    }

    fn answer(&self, question: &Infallible, _: &[Outputs], _: &Asking) -> Result<Answer> {
        match *question {}
    }
}

impl CausalLm {
    /// Whether a model that learns from these documents learns what a text begins with: something stands in front of
    /// every text, in front of those that are joined to others, or of one whose prompt is empty.
    ///
    /// # Errors
    /// As [`Tokenizer::around`].
    pub fn shows_beginnings(documents: &[Document], tokenizer: &Tokenizer, cutting: Cutting) -> Result<bool> {
        let joined = cutting == Cutting::Concatenated && documents.len() > 1;
        Ok(joined
            || !tokenizer.around()?.0.is_empty()
            || documents.iter().any(|document| document.prompt.as_deref() == Some("")))
    }

    /// Each token's target: the token behind it, where that is to be predicted. (T), of a whole packed batch.
    pub fn targets(examples: &[(&Encoding, &NextTokens)]) -> Vec<Option<u32>> {
        let mut wanted = Vec::new();
        for (encoding, next) in examples {
            let behind = encoding.ids.iter().zip(&next.predicted).skip(1);
            wanted.extend(behind.map(|(&id, &predicted)| predicted.then_some(id)));
            wanted.push(None);
        }
        wanted
    }

    /// The metrics of predicted tokens: mean loss in nats a token, perplexity, and bits a byte of text.
    pub fn measured(losses: f64, targets: &[&NextTokens]) -> Metrics {
        let tokens: usize = targets.iter().map(|next| next.count()).sum();
        let bytes: usize = targets.iter().map(|next| next.bytes).sum();
        let loss = losses / tokens as f64;
        Metrics::from([
            ("loss".to_owned(), loss),
            ("perplexity".to_owned(), loss.exp()),
            ("bits_per_byte".to_owned(), losses / std::f64::consts::LN_2 / bytes as f64),
        ])
    }
}
