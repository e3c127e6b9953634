//! text-embeddings-inference's `/tokenize` and `/decode`: texts → tokens with their places, and back.

use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::openapi::schema::{AnyOfBuilder, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::answers::Token;
use super::refusal::Refusal;
use super::routes::{OneOrMany, parsed};
use crate::data::tokens::Tokenizer;

/// Texts, to be cut into tokens.
#[derive(Deserialize, ToSchema)]
pub struct Tokenize {
    inputs: OneOrMany<String>,
    /// Whether the model's own tokens stand around them; true where it isn't said.
    add_special_tokens: Option<bool>,
}

/// The tokens of each text: id, text, whether it is special, and where it stands in characters.
///
/// # Errors
/// The body is none, or a text can't be tokenized.
pub fn tokenize(tokenizer: &Tokenizer, body: &[u8]) -> Result<Value, Refusal> {
    let Tokenize { inputs, add_special_tokens } = parsed(body)?;
    let tokens = |text: String| {
        let special = add_special_tokens.unwrap_or(true);
        let encoding = tokenizer.inner().encode_char_offsets(text.as_str(), special);
        let encoding = encoding.map_err(|error| Refusal::invalid(error.to_string()))?;
        let characters: Vec<char> = text.chars().collect();
        let token = |i: usize| {
            let (id, (start, end)) = (encoding.get_ids()[i], encoding.get_offsets()[i]);
            match characters.get(start..end) {
                Some(text) if encoding.get_special_tokens_mask()[i] == 0 => {
                    let text: String = text.iter().collect();
                    json!(Token { id, text, special: false, start: Some(start), stop: Some(end) })
                }
                _ => {
                    let text = encoding.get_tokens()[i].clone();
                    json!(Token { id, text, special: true, start: None, stop: None })
                }
            }
        };
        Ok(Value::Array((0..encoding.len()).map(token).collect()))
    };
    Ok(Value::Array(inputs.split().1.into_iter().map(tokens).collect::<Result<_, Refusal>>()?))
}

/// Tokens, to be put together.
#[derive(Deserialize, ToSchema)]
pub struct Decode {
    #[schema(schema_with = Ids::schema)]
    ids: Ids,
    /// Whether the model's own tokens are left out; true where it isn't said.
    skip_special_tokens: Option<bool>,
}

/// The tokens of one text, or of several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a list of token ids, or a list of such lists")]
enum Ids {
    One(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

impl Ids {
    /// An empty list is both: a text of no tokens.
    fn schema() -> Schema {
        AnyOfBuilder::new()
            .description(Some("Tokens of a text, or of several."))
            .item(Vec::<u32>::schema())
            .item(Vec::<Vec<u32>>::schema())
            .build()
            .into()
    }
}

/// The text of each list of tokens.
///
/// # Errors
/// The body is none, or the tokenizer can't make a text of them.
pub fn decode(tokenizer: &Tokenizer, body: &[u8]) -> Result<Value, Refusal> {
    let Decode { ids, skip_special_tokens } = parsed(body)?;
    let lists = match ids {
        Ids::One(ids) => vec![ids],
        Ids::Many(lists) => lists,
    };
    let inner = tokenizer.inner();
    let text = |ids: &Vec<u32>| {
        if let Some(id) = ids.iter().find(|&&id| inner.id_to_token(id).is_none()) {
            return Err(Refusal::invalid(format!("ids: the tokenizer has no token {id}")));
        }
        let text = inner.decode(ids, skip_special_tokens.unwrap_or(true));
        text.map(Value::String).map_err(|error| Refusal::invalid(error.to_string()))
    };
    Ok(Value::Array(lists.iter().map(text).collect::<Result<_, _>>()?))
}
