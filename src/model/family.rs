//! What a family is: all that is particular to one `model_type` stands in one file, which implements
//! [`Architecture`]; [`Family`] is the one list of them. Nothing else names a family.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::data::tokens::Vocabulary;
use crate::model::bert::Bert;
use crate::model::deberta_v2::DebertaV2;
use crate::model::distilbert::DistilBert;
use crate::model::electra::Electra;
use crate::model::gpt2::Gpt2;
use crate::model::lora::{Adapted, Lora};
use crate::model::modernbert::ModernBert;
use crate::model::mpnet::MpNet;
use crate::model::ops::{Ops, Pick};
use crate::model::roberta::Roberta;
use crate::{Result, bail_unusable, unusable};

/// What a task asks a family for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// One row of scores a sequence, (B, labels): `transformers`' `…ForSequenceClassification`.
    SequenceClassification { labels: usize },
    /// One row of scores a token, (T, labels): `…ForTokenClassification`.
    TokenClassification { labels: usize },
    /// Two scores a token, (T, 2), of an answer's beginning and of its end there: `…ForQuestionAnswering`.
    QuestionAnswering,
    /// The scores of the token that stands at every place, (T, V), or at the places that are asked for alone:
    /// `…ForMaskedLM`.
    MaskedLm,
    /// Two scores a pair of texts, (B, 2): that the second follows the first, and that it does not:
    /// `…ForNextSentencePrediction`.
    NextSentence,
    /// Both, as BERT is pre-trained: (T, V) and (B, 2). `…ForPreTraining`.
    PreTraining,
    /// The hidden states alone, (T, C), or those of one token of every sequence, (B, C): `…Model`.
    Embedding { wanted: Option<Pick> },
    /// The scores of the next token behind every token, (T, V), or behind one token of every sequence alone, (B, V):
    /// `…LMHeadModel`.
    CausalLm { wanted: Option<Pick> },
}

impl Head {
    /// The task that asks for it, as `--task` has it.
    pub fn task(self) -> &'static str {
        match self {
            Self::SequenceClassification { .. } => "text-classification",
            Self::TokenClassification { .. } => "token-classification",
            Self::QuestionAnswering => "question-answering",
            Self::MaskedLm => "masked-lm",
            Self::NextSentence => "next-sentence",
            Self::PreTraining => "masked-lm,next-sentence",
            Self::Embedding { .. } => "embedding",
            Self::CausalLm { .. } => "causal-lm",
        }
    }

    /// What PEFT calls the task that it is for, as `task_type`.
    pub fn peft_task(self) -> Option<&'static str> {
        match self {
            Self::SequenceClassification { .. } => Some("SEQ_CLS"),
            Self::TokenClassification { .. } => Some("TOKEN_CLS"),
            Self::QuestionAnswering => Some("QUESTION_ANS"),
            Self::Embedding { .. } => Some("FEATURE_EXTRACTION"),
            Self::CausalLm { .. } => Some("CAUSAL_LM"),
            Self::MaskedLm | Self::NextSentence | Self::PreTraining => None,
        }
    }

    /// What the names of the modules end with that PEFT always trains and saves as they are.
    pub fn peft_modules(self) -> &'static [&'static str] {
        match self {
            Self::SequenceClassification { .. } | Self::TokenClassification { .. } => {
                &["classifier", "score"]
            }
            Self::QuestionAnswering => &["qa_outputs"],
            _ => &[],
        }
    }

    /// What the name of its class in `transformers` ends with, for most families.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::SequenceClassification { .. } => "ForSequenceClassification",
            Self::TokenClassification { .. } => "ForTokenClassification",
            Self::QuestionAnswering => "ForQuestionAnswering",
            Self::MaskedLm => "ForMaskedLM",
            Self::NextSentence => "ForNextSentencePrediction",
            Self::PreTraining => "ForPreTraining",
            Self::Embedding { .. } => "Model",
            Self::CausalLm { .. } => "LMHeadModel",
        }
    }

    /// Why a family lacks this head, as `transformers` does too.
    pub(super) fn refused(self, model_type: &str) -> anyhow::Error {
        let task = self.task();
        match self {
            Self::CausalLm { .. } => unusable!(
                "causal-lm needs a model that predicts the next token (model_type gpt2); a {model_type} sees every token \
                 at once"
            ),
            Self::MaskedLm => unusable!(
                "{task} needs a model that sees a token's whole sentence, such as bert; a {model_type} sees what stands \
                 before it alone"
            ),
            _ => {
                unusable!("{task} needs a head that transformers has for bert; it has none for {model_type}")
            }
        }
    }
}

/// How a family's checkpoints name their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// What the names of the body begin with, such as `bert.`: a checkpoint of the bare body lacks it.
    pub prefix: &'static str,
    /// What the names of the body begin with behind the prefix.
    pub parts: &'static [&'static str],
    /// What the names of buffers end with, which are no weights.
    pub buffers: &'static [&'static str],
}

/// How wide a model is, and what it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// C, of the hidden states.
    pub channels: usize,
    /// V, the rows of the token table: every token id is smaller.
    pub vocabulary: usize,
    /// The tokens of the longest sequence.
    pub positions: usize,
    /// How many kinds of tokens there are, of which a pair of texts needs two. None where the model reads no types.
    pub token_types: Option<usize>,
    /// Whether a pair of texts can be told apart, by token types or by the tokens between them.
    pub pairs: bool,
}

/// One `model_type`, or several that are one network: its configuration, body, heads, names and limits.
pub trait Architecture: Sized {
    /// The `model_type`s of `config.json` that it reads.
    const MODEL_TYPES: &'static [&'static str];
    /// What the modules are called that LoRA adapts where nobody says otherwise: PEFT's choice, where it has one.
    const LORA_TARGETS: &'static [&'static str];
    /// The keys of `config.json` that hold a dropout probability.
    const DROPOUTS: &'static [&'static str];

    /// What vocabulary its models learn from texts of their own.
    const VOCABULARY: Vocabulary;

    /// Reads and checks the fields of `config.json`.
    ///
    /// # Errors
    /// Unusable: names every field that tk can't run.
    fn read(raw: &Map<String, Value>) -> Result<Self>;

    /// How its checkpoints name their weights.
    fn names(&self) -> Names;

    /// What it can take.
    fn limits(&self) -> Limits;

    /// The standard deviation that new weights are drawn with.
    fn initializer_range(&self) -> f64;

    /// Which of its `model_type`s it is.
    fn model_type(&self) -> &str {
        Self::MODEL_TYPES[0]
    }

    /// The name of the class in `transformers` that is a model of this type with a head, such as
    /// `BertForSequenceClassification`. None where it has no such head.
    fn class(model_type: &str, head: Head) -> Option<String>;

    /// The model with a head: what the head gives, most give one.
    ///
    /// # Errors
    /// It has no such head, which the error says by name.
    fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>>;

    /// Whether its tokenizers have no token for padding, so that the end of a text stands for it.
    fn pads_with_the_end(&self) -> bool {
        false
    }
}

/// Makes the list of families: an enum over what their files define, each call handed to the one that is meant.
macro_rules! families {
    ($($family:ident),+) => {
        /// A model's architecture with its configuration: one of all that tk defines; and what stands beside its maps.
        #[derive(Clone, Debug)]
        pub struct Family {
            network: Network,
            lora: Option<Arc<Lora>>,
        }

        #[derive(Clone, Debug)]
        enum Network {
            $($family($family)),+
        }

        impl Family {
            /// Every `model_type` that tk runs.
            pub fn model_types() -> Vec<&'static str> {
                [$($family::MODEL_TYPES),+].concat()
            }

            /// Reads the architecture that `config.json` speaks of.
            ///
            /// # Errors
            /// Unusable: another `model_type`, or fields that the family refuses.
            pub fn read(raw: &Map<String, Value>) -> Result<Self> {
                let known = || Self::model_types().join(", ");
                match raw.get("model_type") {
                    $(Some(Value::String(name)) if $family::MODEL_TYPES.contains(&name.as_str()) => {
                        Ok(Self { network: Network::$family($family::read(raw)?), lora: None })
                    })+
                    Some(other) => bail_unusable!("model_type is {other}; tk runs {}", known()),
                    None => bail_unusable!("model_type is missing; tk runs {}", known()),
                }
            }

            /// The keys of `config.json` that hold a dropout probability.
            pub fn dropouts(&self) -> &'static [&'static str] {
                match &self.network { $(Network::$family(_) => $family::DROPOUTS),+ }
            }

            /// See [`Architecture::VOCABULARY`].
            pub fn vocabulary(&self) -> Vocabulary {
                match &self.network { $(Network::$family(_) => $family::VOCABULARY),+ }
            }

            /// See [`Architecture::names`].
            pub fn names(&self) -> Names {
                match &self.network { $(Network::$family(family) => family.names()),+ }
            }

            /// See [`Architecture::limits`].
            pub fn limits(&self) -> Limits {
                match &self.network { $(Network::$family(family) => family.limits()),+ }
            }

            /// See [`Architecture::initializer_range`].
            pub fn initializer_range(&self) -> f64 {
                match &self.network { $(Network::$family(family) => family.initializer_range()),+ }
            }

            /// See [`Architecture::model_type`].
            pub fn model_type(&self) -> &str {
                match &self.network { $(Network::$family(family) => family.model_type()),+ }
            }

            /// See [`Architecture::class`].
            pub fn class(&self, head: Head) -> Option<String> {
                match &self.network { $(Network::$family(_) => $family::class(self.model_type(), head)),+ }
            }

            /// The same of any model of a type.
            pub fn class_of(model_type: &str, head: Head) -> Option<String> {
                $(if $family::MODEL_TYPES.contains(&model_type) {
                    return $family::class(model_type, head);
                })+
                None
            }

            /// See [`Architecture::LORA_TARGETS`].
            pub fn lora_targets(&self) -> &'static [&'static str] {
                match &self.network { $(Network::$family(_) => $family::LORA_TARGETS),+ }
            }

            /// The same with something beside its maps, or nothing.
            pub fn adapted(self, lora: Option<Lora>) -> Self {
                Self { lora: lora.map(Arc::new), ..self }
            }

            /// What stands beside its maps.
            pub fn lora(&self) -> Option<&Lora> {
                self.lora.as_deref()
            }

            /// See [`Architecture::define`].
            pub fn define<O: Ops>(&self, o: &O, head: Head) -> Result<Vec<O::X>> {
                match (&self.network, &self.lora) {
                    $((Network::$family(family), None) => family.define(o, head),
                    (Network::$family(family), Some(lora)) => family.define(&Adapted { inner: o, lora }, head)),+
                }
            }

            /// See [`Architecture::pads_with_the_end`].
            pub fn pads_with_the_end(&self) -> bool {
                match &self.network { $(Network::$family(family) => family.pads_with_the_end()),+ }
            }
        }
    };
}

families!(Bert, DistilBert, Roberta, Electra, MpNet, ModernBert, DebertaV2, Gpt2);
