//! The special tokens and those that were added to a vocabulary: what tokenizer_config.json, special_tokens_map.json,
//! added_tokens.json and tokenizer.json say of them, in transformers' order of precedence.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;
use tokenizers::{AddedToken, Model, Tokenizer};

use super::class::{Class, Files, Kind};
use super::settings;
use crate::{Result, bail_unusable, unusable};

/// The keys of special tokens, in the order in which transformers adds them.
const KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token as a file has it. `normalized` follows from `special` where it is not said.
#[derive(Clone, Debug, PartialEq)]
struct Stated {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: Option<bool>,
    special: bool,
}

impl Stated {
    fn named(content: &str) -> Self {
        Self {
            content: content.to_owned(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: None,
            special: false,
        }
    }

    /// A token's object: `content`, and the flags that it has.
    fn of(value: &Value) -> Option<Self> {
        let flag = |key: &str| match value.get(key) {
            None | Some(Value::Null) => Some(None),
            Some(Value::Bool(flag)) => Some(Some(*flag)),
            Some(_) => None,
        };
        Some(Self {
            content: value.get("content")?.as_str()?.to_owned(),
            single_word: flag("single_word")?.unwrap_or(false),
            lstrip: flag("lstrip")?.unwrap_or(false),
            rstrip: flag("rstrip")?.unwrap_or(false),
            normalized: flag("normalized")?,
            special: flag("special")?.unwrap_or(false),
        })
    }

    fn token(&self) -> AddedToken {
        AddedToken::from(&*self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

/// A special token: its flags are known, or its name alone.
#[derive(Clone, Debug)]
struct Special {
    content: String,
    stated: Option<Stated>,
}

/// What a model's files say of its special and added tokens.
pub(super) struct Added {
    /// By key, in [`KEYS`]'s order.
    roles: Vec<(&'static str, Special)>,
    /// `additional_special_tokens`, and newer files' `extra_special_tokens`.
    others: Vec<Special>,
    /// Tokens with the ids that they are said to have, and the file that says it.
    by_id: BTreeMap<u64, (Stated, &'static str)>,
}

impl Added {
    /// Reads the files beside a tokenizer.json that was read as `inner`; `None`: there is none.
    ///
    /// # Errors
    /// Unusable: something that is no token.
    pub fn read(files: &Files, class: Option<&Class>, inner: Option<&Tokenizer>) -> Result<Self> {
        let (kind, built) = (class.map_or(Kind::Plain, |class| class.kind), inner.is_none());
        let place = |name: &str| files.dir.join(name).display().to_string();
        let wrong = |file: &str, key: &str| unusable!("{}: {key} is no token, nor its object", place(file));
        let mut values: HashMap<&str, (Value, &'static str)> = HashMap::new();
        for key in KEYS.iter().chain(&["additional_special_tokens", "extra_special_tokens"]) {
            if let Some(value) = files.config.get(*key) {
                values.insert(*key, (value.clone(), "tokenizer_config.json"));
            }
        }
        let mut by_id = BTreeMap::new();
        let mut flags: HashMap<String, Stated> = HashMap::new();
        if let Some(decoder) = files.config.get("added_tokens_decoder").filter(|value| !value.is_null()) {
            let file = "tokenizer_config.json";
            let decoder = decoder
                .as_object()
                .ok_or_else(|| unusable!("{}: added_tokens_decoder is no object", place(file)))?;
            for (id, value) in decoder {
                let token =
                    Stated::of(value).ok_or_else(|| wrong(file, &format!("added_tokens_decoder[{id}]")))?;
                let id = id.parse().map_err(|_| {
                    unusable!("{}: added_tokens_decoder has {id:?}, which is no id", place(file))
                })?;
                flags.insert(token.content.clone(), token.clone());
                by_id.insert(id, (token, file));
            }
        } else {
            // transformers reads the older files only where there is no added_tokens_decoder
            let file = "special_tokens_map.json";
            for (key, value) in settings(&files.dir.join(file))? {
                let Some(known) =
                    KEYS.iter().chain(&["additional_special_tokens"]).find(|known| **known == key)
                else {
                    continue;
                };
                let value = match (values.remove(*known), value) {
                    (Some((Value::Array(before), _)), Value::Array(more)) => {
                        Value::Array(before.into_iter().chain(more).collect())
                    }
                    (_, value) => value,
                };
                values.insert(*known, (value, file));
            }
            let names: HashSet<String> = values.values().flat_map(|(value, _)| contents(value)).collect();
            let file = "added_tokens.json";
            for (content, id) in settings(&files.dir.join(file))? {
                let Some(id) = id.as_u64() else {
                    bail_unusable!("{}: {content:?} has {id}, which is no id", place(file));
                };
                let special = names.contains(&content);
                let token = Stated { special, ..Stated::named(&content) };
                by_id.insert(id, (token, file));
            }
            if let Some(inner) = inner {
                let own = inner.get_added_tokens_decoder();
                for (id, token) in own.iter().map(|(&id, token)| (u64::from(id), token)) {
                    by_id.remove(&id);
                    let token = Stated {
                        content: token.content.clone(),
                        single_word: token.single_word,
                        lstrip: token.lstrip,
                        rstrip: token.rstrip,
                        normalized: Some(token.normalized),
                        special: token.special,
                    };
                    flags.insert(token.content.clone(), token);
                }
            }
        }

        let one = |value: &Value, file: &str, key: &str| -> Result<Option<Special>> {
            let special = match value {
                Value::Null => return Ok(None),
                Value::String(content) => Special { content: content.clone(), stated: None },
                value => {
                    let stated = Stated::of(value).ok_or_else(|| wrong(file, key))?;
                    Special { content: stated.content.clone(), stated: Some(stated) }
                }
            };
            Ok(Some(special).filter(|special| !special.content.is_empty()))
        };
        let mut roles = Vec::new();
        for key in KEYS {
            let named = match values.get(key) {
                Some((value, file)) => {
                    let mut special = one(value, file, key)?;
                    if let Some(special) = &mut special {
                        special.stated = flags.get(&special.content).cloned().or(special.stated.take());
                    }
                    special
                }
                None => kind
                    .special_tokens()
                    .iter()
                    .find(|(own, _)| *own == key)
                    .map(|(_, content)| Special { content: (*content).to_owned(), stated: None }),
            };
            let Some(mut special) = named else { continue };
            let mask = kind.mask().filter(|_| key == "mask_token");
            if let Some(normalized) = mask {
                let stated = Stated {
                    lstrip: true,
                    normalized: Some(normalized),
                    special: true,
                    ..Stated::named(&special.content)
                };
                special.stated.get_or_insert(stated);
            } else if built && matches!(kind, Kind::Gpt2 | Kind::Roberta | Kind::Bart) {
                let stated =
                    Stated { normalized: Some(true), special: true, ..Stated::named(&special.content) };
                special.stated.get_or_insert(stated);
            }
            roles.push((key, special));
        }
        let mut others = Vec::new();
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            let Some((value, file)) = values.get(key) else { continue };
            let list: Vec<&Value> = match value {
                Value::Null => Vec::new(),
                Value::Array(list) => list.iter().collect(),
                // names of one's own → tokens
                Value::Object(named) if key == "extra_special_tokens" => named.values().collect(),
                _ => bail_unusable!("{}: {key} is no list", place(file)),
            };
            for value in list {
                others.extend(one(value, file, key)?);
            }
        }
        if kind == Kind::Camembert && !values.contains_key("additional_special_tokens") {
            let unused = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"];
            others.extend(unused.map(|content| Special { content: content.to_owned(), stated: None }));
        }
        Ok(Self { roles, others, by_id })
    }

    /// The special token of a key.
    pub fn role(&self, key: &str) -> Option<String> {
        self.roles.iter().find(|(own, _)| *own == key).map(|(_, special)| special.content.clone())
    }

    /// The special tokens that have a key of their own.
    pub fn roles(&self) -> impl Iterator<Item = &str> {
        self.roles.iter().map(|(_, special)| &*special.content)
    }

    /// Whether a file names a token and its id.
    pub fn has_id(&self, content: &str) -> bool {
        self.by_id.values().any(|(token, _)| token.content == content)
    }

    /// Adds to the tokenizer what it lacks, as transformers does. Returns whether there was anything. `built`: the
    /// tokenizer stands in `name`, which knows of no added token.
    ///
    /// # Errors
    /// Unusable: a token whose id is not the one that it would get.
    pub fn add_to(&self, inner: &mut Tokenizer, files: &Files, name: &str, built: bool) -> Result<bool> {
        let own: HashMap<String, AddedToken> = inner
            .get_added_tokens_decoder()
            .into_values()
            .map(|token| (token.content.clone(), token))
            .collect();
        let new: Vec<(u64, String, &'static str)> = self
            .by_id
            .iter()
            .filter(|(_, (token, _))| !token.content.is_empty())
            .filter(|(_, (token, _))| built || inner.token_to_id(&token.content).is_none())
            .map(|(id, (token, file))| (*id, token.content.clone(), *file))
            .collect();

        let mut seen = HashSet::new();
        let specials: Vec<&Special> =
            self.roles.iter().map(|(_, special)| special).chain(&self.others).collect();
        let specials: Vec<&Special> =
            specials.into_iter().filter(|special| seen.insert(special.content.as_str())).collect();
        let by_id: Vec<&Stated> = self
            .by_id
            .values()
            .map(|(token, _)| token)
            .filter(|token| own.get(&token.content) != Some(&token.token()))
            .collect();
        let known: HashSet<&str> =
            own.keys().map(String::as_str).chain(by_id.iter().map(|token| &*token.content)).collect();
        let mut tokens: Vec<Stated> = by_id.iter().copied().cloned().collect();
        for special in &specials {
            match &special.stated {
                Some(stated) if !by_id.iter().any(|token| token.token() == stated.token()) => {
                    tokens.push(stated.clone());
                }
                None if !known.contains(&*special.content) => tokens.push(Stated::named(&special.content)),
                _ => {}
            }
        }
        let tokens = tokens.into_iter().map(|mut token| {
            token.special |= seen.contains(&*token.content);
            token.token()
        });
        let added =
            inner.add_tokens(tokens).map_err(|error| unusable!("{}: {error}", files.dir.display()))?;
        for (id, content, file) in new {
            let place = inner.token_to_id(&content);
            if place.map(u64::from) != Some(id) {
                bail_unusable!(
                    "{}: {file} gives the added token {content:?} the id {id}, and {} is its place {} {name}",
                    files.dir.display(),
                    place.unwrap_or_default(),
                    if inner.get_model().token_to_id(&content).is_some() { "in" } else { "behind" }
                );
            }
        }
        Ok(added > 0)
    }
}

/// The names of the tokens in a value of special_tokens_map.json.
fn contents(value: &Value) -> Vec<String> {
    match value {
        Value::String(content) => vec![content.clone()],
        Value::Array(list) => list.iter().flat_map(contents).collect(),
        value => value.get("content").and_then(Value::as_str).map(str::to_owned).into_iter().collect(),
    }
}
