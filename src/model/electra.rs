//! ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT's layers under embeddings of another width, and heads of its own,
//! over the vocabulary. Its discriminator and its generator are one network with other heads.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Result;
use crate::data::tokens::Vocabulary;
use crate::model::bert::{Bert, encoder};
use crate::model::config::checked;
use crate::model::family::{Architecture, Head, Limits, Names};
use crate::model::ops::{Activation, At, Ids, Ops, Pick, Table};

/// The configuration. Field names and defaults are `transformers.ElectraConfig`'s: BERT's, and the embeddings' width.
#[derive(Clone, Debug, Deserialize)]
pub struct Electra {
    #[serde(flatten)]
    pub bert: Bert,
    #[serde(default = "narrow")]
    pub embedding_size: usize,
}

fn narrow() -> usize {
    128
}

impl Architecture for Electra {
    const MODEL_TYPES: &'static [&'static str] = &["electra"];
    const LORA_TARGETS: &'static [&'static str] = &["query", "value"];
    const DROPOUTS: &'static [&'static str] = Bert::DROPOUTS;
    const VOCABULARY: Vocabulary = Vocabulary::WordPiece;

    fn read(raw: &Map<String, Value>) -> Result<Self> {
        Bert::read(raw)?;
        checked(raw, |c: &Self, found| found.channels("embedding_size", c.embedding_size))
    }

    fn names(&self) -> Names {
        Names {
            prefix: "electra.",
            parts: &["embeddings.", "embeddings_project.", "encoder."],
            ..self.bert.names()
        }
    }

    fn limits(&self) -> Limits {
        self.bert.limits()
    }

    fn initializer_range(&self) -> f64 {
        self.bert.initializer_range
    }

    fn class(_: &str, head: Head) -> Option<String> {
        match head {
            // transformers' `ElectraForPreTraining` is the discriminator, which tells replaced tokens from others
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => None,
            _ => Some(format!("Electra{}", head.suffix())),
        }
    }

    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
        let (width, p) = (self.bert.hidden_size, self.bert.before_classifier());
        let scores = match head {
            Head::SequenceClassification { labels } => {
                let at = At::head("classifier");
                let x = o.dropout(&body(o, self, Some(Pick::First))?, p)?;
                let x = o.linear(at.to("dense").linear(width, width), &x)?;
                let x = o.dropout(&o.activate(&x, Activation::Gelu)?, p)?;
                o.linear(At::labels("classifier.out_proj").linear(width, labels), &x)?
            }
            Head::TokenClassification { labels } => {
                let x = o.dropout(&body(o, self, None)?, p)?;
                o.linear(At::labels("classifier").linear(width, labels), &x)?
            }
            Head::QuestionAnswering => {
                o.linear(At::labels("qa_outputs").linear(width, 2), &body(o, self, None)?)?
            }
            Head::MaskedLm => predictions(o, self, &body(o, self, Some(Pick::Asked))?)?,
            Head::Embedding { wanted } => body(o, self, wanted)?,
            Head::CausalLm { .. } | Head::NextSentence | Head::PreTraining => {
                return Err(head.refused("electra"));
            }
        };
        Ok(vec![scores])
    }
}

/// The table of tokens, whose weight the generator's head shares.
fn words(c: &Electra) -> Table {
    At::body("electra").to("embeddings.word_embeddings").table(c.bert.vocab_size, c.embedding_size)
}

/// Hidden states → the scores of the tokens that stand there: the generator's head.
fn predictions<O: Ops>(o: &O, c: &Electra, x: &O::X) -> Result<O::X> {
    let at = At::head("generator_predictions");
    let x = o.linear(at.to("dense").linear(c.bert.hidden_size, c.embedding_size), x)?;
    let x = o.activate(&x, Activation::Gelu)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(c.embedding_size, c.bert.layer_norm_eps), &x)?;
    o.linear(words(c).tied().with_bias(At::head("generator_lm_head").bias(c.bert.vocab_size)), &x)
}

/// Token ids → hidden states, one (C) a token, or of one token of every sequence alone.
fn body<O: Ops>(o: &O, c: &Electra, wanted: Option<Pick>) -> Result<O::X> {
    let at = At::body("electra");
    let mut x = embeddings(o, &at.to("embeddings"), c)?;
    if c.embedding_size != c.bert.hidden_size {
        x = o.linear(at.to("embeddings_project").linear(c.embedding_size, c.bert.hidden_size), &x)?;
    }
    encoder(o, &at.to("encoder"), &c.bert, x, wanted)
}

/// BERT's embeddings, of their own width.
fn embeddings<O: Ops>(o: &O, at: &At, c: &Electra) -> Result<O::X> {
    let (width, bert) = (c.embedding_size, &c.bert);
    let words = o.embed(words(c), Ids::Tokens)?;
    let types =
        o.embed(at.to("token_type_embeddings").table(bert.type_vocab_size, width), Ids::TokenTypes)?;
    let places =
        o.embed(at.to("position_embeddings").table(bert.max_position_embeddings, width), Ids::Positions)?;
    let x = o.add(&o.add(&words, &types)?, &places)?;
    let x = o.layer_norm(at.to("LayerNorm").norm(width, bert.layer_norm_eps), &x)?;
    let x = o.dropout(&x, bert.hidden_dropout_prob)?;
    o.tap(at.path(), x)
}
