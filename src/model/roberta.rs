//! RoBERTa (Liu et al. 2019, arXiv:1907.11692), and XLM-R and CamemBERT, which are the same network: BERT's layers under
//! other embeddings and heads, over the vocabulary.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::bert::{Bert, encoder};
use crate::model::config::checked;
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Ids, Ops, Pick, Table};

/// The configuration. Field names and defaults are `transformers.RobertaConfig`'s: BERT's, and the token of padding.
#[derive(Clone, Debug, Deserialize)]
pub struct Roberta {
    model_type: String,
    #[serde(flatten)]
    pub bert: Bert,
    /// The token of padding, whose row of the position table padding has; the first token's is the one behind it.
    #[serde(default = "one")]
    pub pad_token_id: u32,
}

fn one() -> u32 {
    1
}

impl Architecture for Roberta {
    const MODEL_TYPES: &'static [&'static str] = &["roberta", "xlm-roberta", "camembert"];
    const LORA_TARGETS: &'static [&'static str] = &["query", "value"];
    const DROPOUTS: &'static [&'static str] = Bert::DROPOUTS;
    const VOCABULARY: Vocabulary = Vocabulary::Roberta;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        Bert::read(raw)?;
        checked(raw, |c: &Self, found| {
            if c.pad_token_id as usize >= c.bert.vocab_size {
                found.say(format!("pad_token_id is {}, vocab_size {}", c.pad_token_id, c.bert.vocab_size));
            }
            if c.limits().positions == 0 {
                found.say(format!(
                    "max_position_embeddings is {}, and the tokens' positions begin behind pad_token_id, at {}",
                    c.bert.max_position_embeddings,
                    c.pad_token_id + 1
                ));
            }
        })
    }

    fn names(&self) -> Names {
        Names { prefix: "roberta.", ..self.bert.names() }
    }

    fn limits(&self) -> Limits {
        let rows = self.bert.max_position_embeddings;
        Limits {
            channels: self.bert.hidden_size,
            vocabulary: self.bert.vocab_size,
            positions: rows.saturating_sub(self.pad_token_id as usize + 1),
            token_types: None, // its tokenizers give none: every token is of the first kind
            pairs: true,
        }
    }

    fn initializer_range(&self) -> f64 {
        self.bert.initializer_range
    }

    fn model_type(&self) -> &str {
        &self.model_type
    }

    fn class(model_type: &str, head: Head) -> Option<String> {
        let name = match model_type {
            "xlm-roberta" => "XLMRoberta",
            "camembert" => "Camembert",
            _ => "Roberta",
        };
        match head {
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("{name}{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let (width, p) = (self.bert.hidden_size, self.bert.before_classifier());
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let at = At::head("classifier");
                let x = o.dropout(&body(o, self, Some(Pick::First))?, p)?;
                let x = o.linear(at.to("dense").linear(width, width), &x)?;
                let x = o.dropout(&o.activate(&x, Activation::Tanh)?, p)?;
                o.linear(At::labels("classifier.out_proj").linear(width, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, p)?;
                o.linear(At::labels("classifier").linear(width, labels), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(width, 2), &body(o, self, None)?)?
            }
            Head::MaskedLm => {
                let at = At::head("lm_head");
                let x = body(o, self, Some(Pick::Asked))?;
                let x = o.activate(&o.linear(at.to("dense").linear(width, width), &x)?, Activation::Gelu)?;
                let x = o.layer_norm(at.to("layer_norm").norm(width, self.bert.layer_norm_eps), &x)?;
                o.linear(words(self).tied().with_bias(at.bias(self.bert.vocab_size)), &x)?
            }
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused(&self.model_type));
            }
        };
        Ok(vec![scores])
    }
}

/// The table of tokens, whose weight the head of masked words shares.
fn words(c: &Roberta) -> Table {
    At::body("roberta").to("embeddings.word_embeddings").table(c.bert.vocab_size, c.bert.hidden_size)
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone.
fn body<O: Ops>(o: &O, c: &Roberta, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("roberta");
    let x = embeddings(o, &at.to("embeddings"), c)?;
    encoder(o, &at.to("encoder"), &c.bert, x, wanted)
}

fn embeddings<O: Ops>(o: &O, at: &At, c: &Roberta) -> Result<O::X> {
    let (width, bert) = (c.bert.hidden_size, &c.bert);
    let words = o.embed(words(c), Ids::Tokens)?;
    let types = o.embed(at.to("token_type_embeddings").table(bert.type_vocab_size, width), Ids::Zero)?;
    let rows = bert.max_position_embeddings;
    let positions = Ids::PositionsBehind { padding: c.pad_token_id };
    let places = o.embed(at.to("position_embeddings").table(rows, width), positions)?;
    let x = o.add(&o.add(&words, &types)?, &places)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, bert.layer_norm_eps), &x)?;
    let x = o.dropout(&x, bert.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}
