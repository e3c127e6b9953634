//! Bodies of requests → records, by route: those of text-embeddings-inference, OpenAI and Cohere.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};

use super::forms::{Form, Ranks};
use super::refusal::{Manner, Refusal};

/// A record, as a line of a file would have it.
pub type Record = Map<String, Value>;

/// What a request asks of a model.
pub struct Asks {
    pub records: Vec<Record>,
    /// Whether a text may be cut to the model's length.
    pub truncate: bool,
    /// The model that the body names.
    pub model: Option<String>,
    /// What makes the body of the answers.
    pub form: Form,
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Predict,
    Entities,
    Answers,
    Fills,
    Embed,
    Similarity,
    Rerank,
    RerankCohere,
    OpenAiEmbeddings,
}

impl Route {
    /// Each with its paths; all but OpenAI's and Cohere's also stand behind `/models/NAME`.
    pub const ALL: [(Self, &'static [&'static str]); 9] = [
        (Self::Predict, &["/predict", "/classify"]),
        (Self::Entities, &["/entities"]),
        (Self::Answers, &["/answers"]),
        (Self::Fills, &["/fills"]),
        (Self::Embed, &["/embed"]),
        (Self::Similarity, &["/similarity"]),
        (Self::Rerank, &["/rerank"]),
        (Self::RerankCohere, &["/v1/rerank", "/v2/rerank"]),
        (Self::OpenAiEmbeddings, &["/v1/embeddings"]),
    ];

    /// The field that an answer has to have, of a model that can be asked so.
    pub fn field(self) -> Option<&'static str> {
        match self {
            Self::Predict | Self::Rerank | Self::RerankCohere => Some("scores"),
            Self::Entities => Some("entities"),
            Self::Answers => Some("answer"),
            Self::Fills => Some("fills"),
            Self::Embed | Self::Similarity | Self::OpenAiEmbeddings => Some("embedding"),
        }
    }

    /// The form of its errors.
    pub fn manner(self) -> Manner {
        match self {
            Self::OpenAiEmbeddings => Manner::OpenAi,
            _ => Manner::Tei,
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// It is no JSON, lacks a field, has one of another kind, or asks for nothing.
    pub fn read(self, body: &[u8]) -> Result<Asks, Refusal> {
        match self {
            Self::Predict => predict(parsed(body)?),
            Self::Entities => Ok(texts(parsed(body)?, "entities")),
            Self::Fills => Ok(texts(parsed(body)?, "fills")),
            Self::Answers => Ok(answers(parsed(body)?)),
            Self::Embed => Ok(embed(parsed(body)?)),
            Self::Similarity => Ok(similarity(parsed(body)?)),
            Self::Rerank => Ok(rerank(parsed(body)?)),
            Self::RerankCohere => Ok(rerank_cohere(parsed(body)?)),
            Self::OpenAiEmbeddings => openai_embeddings(parsed(body)?),
        }
        .and_then(|asks| match asks.records.len() {
            0 => Err(Refusal::empty("there is no text in it")),
            _ => Ok(asks),
        })
    }
}

/// What a body says.
///
/// # Errors
/// It is no JSON, or other JSON.
pub(super) fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    let json = &mut serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut *json).map_err(|error| {
        let place = error.path().to_string();
        let place = if place == "." { String::new() } else { format!("{place}: ") };
        Refusal::invalid(format!("{place}{}", error.into_inner()))
    })?;
    json.end().map_err(|error| Refusal::invalid(error.to_string()))?;
    Ok(value)
}

/// One of something, or a list.
#[derive(Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected one or a list")]
pub enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// Whether it is one, and all of them.
    pub(super) fn split(self) -> (bool, Vec<T>) {
        match self {
            Self::One(one) => (true, vec![one]),
            Self::Many(many) => (false, many),
        }
    }
}

/// What all of text-embeddings-inference's bodies may have.
#[derive(Deserialize, ToSchema)]
struct Common {
    /// Whether a text may be cut to the model's length; true where it isn't said.
    truncate: Option<bool>,
    /// The model, where the path names none.
    model: Option<String>,
}

impl Common {
    fn asks(self, records: Vec<Record>, form: Form) -> Asks {
        Asks { records, truncate: self.truncate.unwrap_or(true), model: self.model, form }
    }
}

fn text(text: String) -> Record {
    Record::from_iter([("text".to_owned(), Value::String(text))])
}

fn pair(first: String, second: String) -> Record {
    let mut record = text(first);
    record.insert("text_pair".to_owned(), Value::String(second));
    record
}

/// Texts or pairs, to be labelled.
#[derive(Deserialize, ToSchema)]
pub(super) struct Predict {
    #[schema(schema_with = Inputs::schema)]
    inputs: Inputs,
    /// Whether scores are the model's logits.
    #[serde(default)]
    raw_scores: bool,
    #[serde(flatten)]
    common: Common,
}

/// A text; a list of one or two texts, which is one text or a pair; or a list of such lists.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, a pair of texts, or a list of lists of one or two texts")]
enum Inputs {
    Text(String),
    Pair(Vec<String>),
    Batch(Vec<Vec<String>>),
}

impl Inputs {
    fn schema() -> Schema {
        let text = || ObjectBuilder::new().schema_type(Type::String);
        let one = || ArrayBuilder::new().items(text()).min_items(Some(1)).max_items(Some(2));
        let several = ArrayBuilder::new().items(one()).min_items(Some(1));
        OneOfBuilder::new()
            .description(Some("A text; a list of one text, or of two, a pair; or a list of such lists."))
            .item(text())
            .item(one())
            .item(several)
            .build()
            .into()
    }
}

fn predict(Predict { inputs, raw_scores, common }: Predict) -> Result<Asks, Refusal> {
    let record = |texts: Vec<String>| {
        let count = texts.len();
        let mut texts = texts.into_iter();
        match (texts.next(), texts.next(), texts.next()) {
            (Some(first), None, _) => Ok(text(first)),
            (Some(first), Some(second), None) => Ok(pair(first, second)),
            _ => Err(Refusal::invalid(format!(
                "inputs: a list of {count} texts, expected one text or a pair; several records are a list of lists"
            ))),
        }
    };
    let (single, records) = match inputs {
        Inputs::Text(one) => (true, vec![text(one)]),
        Inputs::Pair(texts) => (true, vec![record(texts)?]),
        Inputs::Batch(batch) => (false, batch.into_iter().map(record).collect::<Result<_, _>>()?),
    };
    Ok(common.asks(records, Form::Labels { single, raw: raw_scores }))
}

/// A text or texts.
#[derive(Deserialize, ToSchema)]
pub(super) struct Texts {
    inputs: OneOrMany<String>,
    #[serde(flatten)]
    common: Common,
}

fn texts(Texts { inputs, common }: Texts, name: &'static str) -> Asks {
    let (single, inputs) = inputs.split();
    common.asks(inputs.into_iter().map(text).collect(), Form::Field { single, name })
}

/// Questions about contexts.
#[derive(Deserialize, ToSchema)]
pub(super) struct Answers {
    inputs: OneOrMany<Asked>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize, ToSchema)]
struct Asked {
    question: String,
    context: String,
}

fn answers(Answers { inputs, common }: Answers) -> Asks {
    let (single, inputs) = inputs.split();
    let record = |Asked { question, context }| {
        let fields = [("question", question), ("context", context)];
        Record::from_iter(fields.map(|(name, value)| (name.to_owned(), Value::String(value))))
    };
    common.asks(inputs.into_iter().map(record).collect(), Form::Whole { single })
}

/// Texts, to be embedded.
#[derive(Deserialize, ToSchema)]
pub(super) struct Embed {
    inputs: OneOrMany<String>,
    /// Whether embeddings are made of length 1; as the model has them where it isn't said.
    normalize: Option<bool>,
    #[serde(flatten)]
    common: Common,
}

fn embed(Embed { inputs, normalize, common }: Embed) -> Asks {
    let (_, inputs) = inputs.split();
    let form = Form::Embeddings { normalize: normalize.unwrap_or(false) };
    common.asks(inputs.into_iter().map(text).collect(), form)
}

/// Texts that are held against one.
#[derive(Deserialize, ToSchema)]
pub(super) struct Similarity {
    inputs: Compared,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize, ToSchema)]
struct Compared {
    source_sentence: String,
    sentences: Vec<String>,
}

fn similarity(Similarity { inputs, common }: Similarity) -> Asks {
    let Compared { source_sentence, sentences } = inputs;
    let records = sentences.into_iter().map(|sentence| pair(source_sentence.clone(), sentence)).collect();
    common.asks(records, Form::Similarities)
}

/// Texts that are ranked by what they say to a query, as text-embeddings-inference takes them.
#[derive(Deserialize, ToSchema)]
pub(super) struct Rerank {
    query: String,
    texts: Vec<String>,
    #[serde(default)]
    raw_scores: bool,
    #[serde(default)]
    return_text: bool,
    #[serde(flatten)]
    common: Common,
}

fn rerank(Rerank { query, texts, raw_scores, return_text, common }: Rerank) -> Asks {
    let records = texts.iter().map(|text| pair(query.clone(), text.clone())).collect();
    let top = texts.len();
    let form = Form::Ranks { raw: raw_scores, manner: Ranks::Tei, texts, top, with_texts: return_text };
    common.asks(records, form)
}

/// Documents that are ranked by what they say to a query, as Cohere takes them.
#[derive(Deserialize, ToSchema)]
pub(super) struct RerankCohere {
    query: String,
    documents: Vec<Document>,
    top_n: Option<usize>,
    #[serde(default)]
    return_documents: bool,
    #[serde(flatten)]
    common: Common,
}

/// A text, alone or as a field.
#[derive(Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, or an object with a text")]
enum Document {
    Text(String),
    Object { text: String },
}

fn rerank_cohere(body: RerankCohere) -> Asks {
    let RerankCohere { query, documents, top_n, return_documents, common } = body;
    let plain = |document| match document {
        Document::Text(text) | Document::Object { text } => text,
    };
    let texts: Vec<String> = documents.into_iter().map(plain).collect();
    let records = texts.iter().map(|text| pair(query.clone(), text.clone())).collect();
    let top = top_n.unwrap_or(texts.len());
    let form = Form::Ranks { raw: false, manner: Ranks::Cohere, texts, top, with_texts: return_documents };
    common.asks(records, form)
}

/// Texts, to be embedded, as OpenAI takes them.
#[derive(Deserialize, ToSchema)]
pub(super) struct OpenAiEmbeddings {
    input: OneOrMany<String>,
    model: Option<String>,
    #[serde(default)]
    encoding_format: Encoding,
    dimensions: Option<usize>,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    Base64,
}

fn openai_embeddings(body: OpenAiEmbeddings) -> Result<Asks, Refusal> {
    let OpenAiEmbeddings { input, model, encoding_format, dimensions } = body;
    if dimensions == Some(0) {
        return Err(Refusal::invalid("dimensions: 0, expected at least 1"));
    }
    let form = Form::OpenAiEmbeddings { base64: encoding_format == Encoding::Base64, dimensions };
    let records = input.split().1.into_iter().map(text).collect();
    Ok(Asks { records, truncate: true, model, form })
}
