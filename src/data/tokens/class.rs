//! transformers' tokenizer classes: the special tokens that each has by itself, and what it does to a tokenizer.json
//! that its settings speak against (transformers 4.57).

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::{NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

use super::settings;
use crate::{Result, bail_unusable, unusable};

/// What a class does, the words of a text aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// BERT's normalizer follows `do_lower_case`, `strip_accents` and `tokenize_chinese_chars`.
    Bert,
    /// As BERT's, without `tokenize_chinese_chars`.
    MpNet,
    Gpt2,
    /// `<s> A </s></s> B </s>`; the post-processor follows `add_prefix_space` and `trim_offsets`.
    Roberta,
    /// RoBERTa's, but for the mask.
    Bart,
    /// The special tokens around a text follow `add_bos_token` and `add_eos_token`.
    GptNeoX,
    Deberta,
    DebertaV2,
    Albert,
    XlmRoberta,
    Camembert,
    /// `PreTrainedTokenizerFast`: no token of its own.
    Plain,
}

/// A class, as a model's files name it or its `model_type` implies it.
pub(super) struct Class {
    pub kind: Kind,
    /// For messages: the name and where it stands.
    what: String,
}

/// A tokenizer's directory, and what of it is read first.
pub(super) struct Files<'a> {
    pub dir: &'a Path,
    /// tokenizer_config.json
    pub config: &'a Map<String, Value>,
}

impl Files<'_> {
    /// A switch of tokenizer_config.json; `None` where it is not there, or null.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => bail_unusable!(
                "{}: {key} is {value}, expected true or false",
                self.dir.join("tokenizer_config.json").display()
            ),
        }
    }
}

impl Class {
    /// The class that tokenizer_config.json names, else config.json, else the one of config.json's `model_type`.
    /// `None` where nothing says it.
    ///
    /// # Errors
    /// Unusable: a class that tk does not know.
    pub fn of(files: &Files) -> Result<Option<Self>> {
        let model = settings(&files.dir.join("config.json"))?;
        for (file, values) in [("tokenizer_config.json", files.config), ("config.json", &model)] {
            let name = match values.get("tokenizer_class") {
                None | Some(Value::Null) => continue,
                Some(Value::String(name)) => name,
                Some(value) => bail_unusable!(
                    "{}: tokenizer_class is {value}, expected a name",
                    files.dir.join(file).display()
                ),
            };
            let Some(kind) = Kind::of_class(name) else {
                bail_unusable!(
                    "{}: tk does not know what a {name} does; AutoTokenizer.from_pretrained(DIR) of transformers, if it \
                     gives a fast tokenizer, can be saved: set \"tokenizer_class\": \"PreTrainedTokenizerFast\" in the \
                     tokenizer_config.json beside the tokenizer.json that save_pretrained writes",
                    files.dir.join(file).display()
                );
            };
            return Ok(Some(Self { kind, what: format!("{name} of {file}") }));
        }
        let kind = model.get("model_type").and_then(Value::as_str).and_then(Kind::of_model_type);
        Ok(kind.map(|kind| Self { kind, what: format!("{kind:?}'s tokenizer, by config.json's model_type") }))
    }

    /// BERT's for a `vocab.txt` of which nothing says more, GPT-2's for a `vocab.json`.
    pub fn default_of(kind: Kind) -> Self {
        Self { kind, what: format!("{kind:?}'s tokenizer") }
    }

    /// # Errors
    /// Unusable: a class that isn't one of `kinds`, which `file` is enough for.
    pub fn buildable(&self, kinds: &[Kind], dir: &Path, file: &str) -> Result<()> {
        if kinds.contains(&self.kind) {
            return Ok(());
        }
        bail_unusable!(
            "{}: a tokenizer ({}) can't be built from {file}, and tokenizer.json is not there; \
             AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes it",
            dir.display(),
            self.what
        );
    }

    /// Puts around a text what the class does, where the tokenizer is built from a vocabulary. The special tokens are
    /// known to it already.
    pub fn set_template(
        &self,
        inner: &mut Tokenizer,
        files: &Files,
        special: impl Fn(&str) -> Option<String>,
    ) -> Result<()> {
        let known = |key: &str| -> Result<(String, u32)> {
            let token = special(key).unwrap_or_default();
            let id = inner.token_to_id(&token).ok_or_else(|| {
                unusable!("{}: the special token {token:?} ({key}) has no id", files.dir.display())
            })?;
            Ok((token, id))
        };
        let processor = match self.kind {
            Kind::Bert => {
                let [cls, sep] = [known("cls_token")?, known("sep_token")?];
                let (first, second) = (|| piece(&sep, 0), || piece(&sep, 1));
                template(
                    vec![piece(&cls, 0), text("A", 0), first()],
                    vec![piece(&cls, 0), text("A", 0), first(), text("B", 1), second()],
                    &[cls.clone(), sep.clone()],
                )
            }
            Kind::Roberta | Kind::Bart => json!({
                "type": "RobertaProcessing", "sep": known("sep_token")?, "cls": known("cls_token")?,
                "trim_offsets": true, "add_prefix_space": files.flag("add_prefix_space")?.unwrap_or(false),
            }),
            _ if files.flag("add_bos_token")?.unwrap_or(false) => {
                let bos = known("bos_token")?;
                template(
                    vec![piece(&bos, 0), text("A", 0)],
                    vec![piece(&bos, 0), text("A", 0), text("B", 1)],
                    std::slice::from_ref(&bos),
                )
            }
            _ => {
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true})
            }
        };
        inner.with_post_processor(Some(serde_json::from_value::<PostProcessorWrapper>(processor)?));
        Ok(())
    }

    /// Makes the parts anew that transformers makes anew where tokenizer_config.json says otherwise. Returns whether
    /// there was one.
    ///
    /// # Errors
    /// Unusable: a setting that tokenizer.json has no part for.
    pub fn apply(
        &self,
        inner: &mut Tokenizer,
        files: &Files,
        special: impl Fn(&str) -> Option<String>,
    ) -> Result<bool> {
        let mut changed = self.set_prefix_space(inner, files)?;
        match self.kind {
            Kind::Bert | Kind::MpNet => changed |= self.set_normalizer(inner, files)?,
            Kind::Roberta | Kind::Bart => {
                let wanted = [
                    ("add_prefix_space", files.flag("add_prefix_space")?.unwrap_or(false)),
                    ("trim_offsets", files.flag("trim_offsets")?.unwrap_or(true)),
                ];
                let mut state = serde_json::to_value(inner.get_post_processor())?;
                if set(&mut state, &wanted) {
                    inner.with_post_processor(Some(serde_json::from_value::<PostProcessorWrapper>(state)?));
                    changed = true;
                }
            }
            Kind::GptNeoX => {
                let before = serde_json::to_value(inner.get_post_processor())?;
                let ends = ["bos", "eos"].map(|key| -> Result<Option<(String, u32)>> {
                    if !files.flag(&format!("add_{key}_token"))?.unwrap_or(false) {
                        return Ok(None);
                    }
                    let token = special(&format!("{key}_token")).unwrap_or_default();
                    let id = inner.token_to_id(&token).ok_or_else(|| {
                        let path = files.dir.join("tokenizer_config.json");
                        unusable!("{}: add_{key}_token is true, and there is no {key}_token", path.display())
                    })?;
                    Ok(Some((token, id)))
                });
                let [bos, eos] = ends;
                let (bos, eos) = (bos?, eos?);
                let around = |name: &str, kind: u32| {
                    let (bos, eos) = (bos.iter().map(|t| piece(t, kind)), eos.iter().map(|t| piece(t, kind)));
                    bos.chain([text(name, kind)]).chain(eos).collect::<Vec<_>>()
                };
                let mut tokens: Vec<(String, u32)> = bos.iter().chain(&eos).cloned().collect();
                tokens.dedup();
                let pair = [around("A", 0), around("B", 1)].concat();
                let after =
                    serde_json::from_value::<PostProcessorWrapper>(template(around("A", 0), pair, &tokens))?;
                if serde_json::to_value(&after)? != before {
                    inner.with_post_processor(Some(after));
                    changed = true;
                }
            }
            _ => {}
        }
        Ok(changed)
    }

    /// Every fast tokenizer's pre-tokenizer has the `add_prefix_space` of tokenizer_config.json, which is false where
    /// that says nothing.
    fn set_prefix_space(&self, inner: &mut Tokenizer, files: &Files) -> Result<bool> {
        let wanted = match (files.flag("add_prefix_space")?, files.config.get("add_prefix_space")) {
            (None, Some(_)) => return Ok(false), // null: transformers leaves it alone
            (wanted, _) => wanted.unwrap_or(false),
        };
        let mut state = serde_json::to_value(inner.get_pre_tokenizer())?;
        let changed = set(&mut state, &[("add_prefix_space", wanted)]);
        if changed {
            inner.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(state)?));
        }
        Ok(changed)
    }

    fn set_normalizer(&self, inner: &mut Tokenizer, files: &Files) -> Result<bool> {
        let required = |key: &str| match files.config.get(key) {
            Some(Value::Null) => {
                let path = files.dir.join("tokenizer_config.json");
                Err(unusable!("{}: {key} is null, expected true or false", path.display()))
            }
            _ => Ok(files.flag(key)?.unwrap_or(true)),
        };
        let (lowercase, chinese) = (required("do_lower_case")?, required("tokenize_chinese_chars")?);
        let accents = files.flag("strip_accents")?;
        let mut state = serde_json::to_value(inner.get_normalizer())?;
        if state.is_null() {
            let given = |key: &str| files.config.get(key) == Some(&Value::Bool(true));
            if let Some(key) = ["do_lower_case", "strip_accents"].into_iter().find(|key| given(key)) {
                bail_unusable!(
                    "{}: tokenizer_config.json says {key}: true, and tokenizer.json has no normalizer that could do \
                     it ({}): write one into tokenizer.json, or \"tokenizer_class\": \"PreTrainedTokenizerFast\" \
                     into tokenizer_config.json",
                    files.dir.display(),
                    self.what
                );
            }
            return Ok(false);
        }
        // transformers asks each setting of whatever normalizer there is; none but BERT's has them
        if state["type"] != "BertNormalizer" {
            return Ok(false);
        }
        let mut wanted = vec![("lowercase", json!(lowercase)), ("strip_accents", json!(accents))];
        if self.kind == Kind::Bert {
            wanted.push(("handle_chinese_chars", json!(chinese)));
        }
        if wanted.iter().all(|(key, value)| state[*key] == *value) {
            return Ok(false);
        }
        for (key, value) in wanted {
            state[key] = value;
        }
        let normalizer = serde_json::from_value::<NormalizerWrapper>(state)?;
        inner.with_normalizer(Some(normalizer)).map_err(|error| unusable!("{error}"))?;
        Ok(true)
    }
}

impl Kind {
    fn of_class(name: &str) -> Option<Self> {
        let family = match name {
            // transformers 5 writes the second for the first
            "PreTrainedTokenizerFast" | "TokenizersBackend" => return Some(Self::Plain),
            _ => name.strip_suffix("Fast").unwrap_or(name).strip_suffix("Tokenizer")?,
        };
        Some(match family {
            "Bert" | "DistilBert" | "Electra" | "MobileBert" | "ConvBert" | "LayoutLM" | "Lxmert"
            | "SqueezeBert" => Self::Bert,
            "MPNet" => Self::MpNet,
            "GPT2" => Self::Gpt2,
            "Roberta" | "Longformer" => Self::Roberta,
            "Bart" | "LED" => Self::Bart,
            "GPTNeoX" => Self::GptNeoX,
            "Deberta" => Self::Deberta,
            "DebertaV2" => Self::DebertaV2,
            "Albert" => Self::Albert,
            "XLMRoberta" => Self::XlmRoberta,
            "Camembert" => Self::Camembert,
            _ => return None,
        })
    }

    /// transformers' `TOKENIZER_MAPPING`, for the models that tk may read.
    fn of_model_type(name: &str) -> Option<Self> {
        Some(match name {
            "bert" | "distilbert" | "electra" | "mobilebert" => Self::Bert,
            "mpnet" => Self::MpNet,
            "gpt2" => Self::Gpt2,
            "roberta" => Self::Roberta,
            "xlm-roberta" => Self::XlmRoberta,
            "camembert" => Self::Camembert,
            "deberta" => Self::Deberta,
            "deberta-v2" => Self::DebertaV2,
            "albert" => Self::Albert,
            _ => return None,
        })
    }

    /// The special tokens of a class where no file names others.
    pub fn special_tokens(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Bert => &[
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::MpNet => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "[UNK]"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::Gpt2 | Self::GptNeoX => &[
                ("bos_token", super::byte_level::END),
                ("eos_token", super::byte_level::END),
                ("unk_token", super::byte_level::END),
            ],
            Self::Roberta | Self::Bart | Self::XlmRoberta | Self::Camembert => &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
                ("sep_token", "</s>"),
                ("pad_token", "<pad>"),
                ("cls_token", "<s>"),
                ("mask_token", "<mask>"),
            ],
            Self::Deberta | Self::DebertaV2 => &[
                ("bos_token", "[CLS]"),
                ("eos_token", "[SEP]"),
                ("unk_token", "[UNK]"),
                ("sep_token", "[SEP]"),
                ("pad_token", "[PAD]"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Albert => &[
                ("bos_token", "[CLS]"),
                ("eos_token", "[SEP]"),
                ("unk_token", "<unk>"),
                ("sep_token", "[SEP]"),
                ("pad_token", "<pad>"),
                ("cls_token", "[CLS]"),
                ("mask_token", "[MASK]"),
            ],
            Self::Plain => &[],
        }
    }

    /// Whether a mask that is named as text alone takes the space before it along; and whether it is normalized.
    pub fn mask(self) -> Option<bool> {
        match self {
            Self::Roberta | Self::Albert | Self::XlmRoberta | Self::Camembert | Self::MpNet => Some(false),
            Self::Bart => Some(true),
            _ => None,
        }
    }
}

/// Sets those of an object's switches that it has. Returns whether one was otherwise.
fn set(state: &mut Value, wanted: &[(&str, bool)]) -> bool {
    let mut changed = false;
    for (key, wanted) in wanted {
        if let Some(found) = state.get_mut(*key).filter(|found| **found != *wanted) {
            *found = (*wanted).into();
            changed = true;
        }
    }
    changed
}

fn piece((token, _): &(String, u32), kind: u32) -> Value {
    json!({"SpecialToken": {"id": token, "type_id": kind}})
}

fn text(name: &str, kind: u32) -> Value {
    json!({"Sequence": {"id": name, "type_id": kind}})
}

fn template(single: Vec<Value>, pair: Vec<Value>, tokens: &[(String, u32)]) -> Value {
    let tokens: Map<String, Value> = tokens
        .iter()
        .map(|(token, id)| (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}
