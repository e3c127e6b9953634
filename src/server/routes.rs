//! Bodies of requests → records, and answers → bodies, by route. What a record is answered is the same as in
//! `tk serve-batch`; here it takes the forms that clients of text-embeddings-inference, OpenAI, Cohere and the Open
//! Inference Protocol know.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::refusal::{Manner, Refusal};
use crate::task::scores::short;

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

/// How answers become a body.
pub enum Form {
    /// The labels of each, best first; of one record without a list around.
    Labels {
        single: bool,
        raw: bool,
    },
    /// One field of each answer.
    Field {
        single: bool,
        name: &'static str,
    },
    /// All fields.
    Whole {
        single: bool,
    },
    Embeddings {
        normalize: bool,
    },
    OpenAiEmbeddings {
        base64: bool,
        dimensions: Option<usize>,
    },
    Similarities,
    /// Texts from the best; `top` of them.
    Ranks {
        raw: bool,
        manner: Ranks,
        texts: Vec<String>,
        top: usize,
        with_texts: bool,
    },
    /// A tensor of answers, each as JSON.
    Tensor {
        id: Option<String>,
    },
}

/// Whose ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    /// `[{"index", "score"}]`
    Tei,
    /// `{"results": [{"index", "relevance_score"}]}`
    Cohere,
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
    Infer,
}

impl Route {
    /// Each with its paths; all but OpenAI's and the Inference Protocol's also stand behind `/models/NAME`.
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
            Self::Infer => None,
        }
    }

    /// The form of its errors.
    pub fn manner(self) -> Manner {
        match self {
            Self::OpenAiEmbeddings => Manner::OpenAi,
            Self::Infer => Manner::Inference,
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
            Self::Answers => answers(parsed(body)?),
            Self::Embed => embed(parsed(body)?),
            Self::Similarity => similarity(parsed(body)?),
            Self::Rerank => rerank(parsed(body)?),
            Self::RerankCohere => rerank_cohere(parsed(body)?),
            Self::OpenAiEmbeddings => openai_embeddings(parsed(body)?),
            Self::Infer => infer(parsed(body)?),
        }
        .and_then(|asks| match asks.records.len() {
            0 => Err(Refusal::empty("there is no text in it")),
            _ => Ok(asks),
        })
    }
}

fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
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
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected one or a list")]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn split(self) -> (bool, Vec<T>) {
        match self {
            Self::One(one) => (true, vec![one]),
            Self::Many(many) => (false, many),
        }
    }
}

/// What all of text-embeddings-inference's bodies may have.
#[derive(Deserialize)]
struct Common {
    truncate: Option<bool>,
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

#[derive(Deserialize)]
struct Predict {
    inputs: Inputs,
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

#[derive(Deserialize)]
struct Texts {
    inputs: OneOrMany<String>,
    #[serde(flatten)]
    common: Common,
}

fn texts(Texts { inputs, common }: Texts, name: &'static str) -> Asks {
    let (single, inputs) = inputs.split();
    common.asks(inputs.into_iter().map(text).collect(), Form::Field { single, name })
}

#[derive(Deserialize)]
struct Answers {
    inputs: OneOrMany<Asked>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct Asked {
    question: String,
    context: String,
}

fn answers(Answers { inputs, common }: Answers) -> Result<Asks, Refusal> {
    let (single, inputs) = inputs.split();
    let record = |Asked { question, context }| {
        let fields = [("question", question), ("context", context)];
        Record::from_iter(fields.map(|(name, value)| (name.to_owned(), Value::String(value))))
    };
    Ok(common.asks(inputs.into_iter().map(record).collect(), Form::Whole { single }))
}

#[derive(Deserialize)]
struct Embed {
    inputs: OneOrMany<String>,
    /// Whether embeddings are made of length 1; as the model has them where it isn't said.
    normalize: Option<bool>,
    #[serde(flatten)]
    common: Common,
}

fn embed(Embed { inputs, normalize, common }: Embed) -> Result<Asks, Refusal> {
    let (_, inputs) = inputs.split();
    let form = Form::Embeddings { normalize: normalize.unwrap_or(false) };
    Ok(common.asks(inputs.into_iter().map(text).collect(), form))
}

#[derive(Deserialize)]
struct Similarity {
    inputs: Compared,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct Compared {
    source_sentence: String,
    sentences: Vec<String>,
}

fn similarity(Similarity { inputs, common }: Similarity) -> Result<Asks, Refusal> {
    let Compared { source_sentence, sentences } = inputs;
    let records = sentences.into_iter().map(|sentence| pair(source_sentence.clone(), sentence)).collect();
    Ok(common.asks(records, Form::Similarities))
}

#[derive(Deserialize)]
struct Rerank {
    query: String,
    texts: Vec<String>,
    #[serde(default)]
    raw_scores: bool,
    #[serde(default)]
    return_text: bool,
    #[serde(flatten)]
    common: Common,
}

fn rerank(Rerank { query, texts, raw_scores, return_text, common }: Rerank) -> Result<Asks, Refusal> {
    let records = texts.iter().map(|text| pair(query.clone(), text.clone())).collect();
    let top = texts.len();
    let form = Form::Ranks { raw: raw_scores, manner: Ranks::Tei, texts, top, with_texts: return_text };
    Ok(common.asks(records, form))
}

#[derive(Deserialize)]
struct RerankCohere {
    query: String,
    documents: Vec<Document>,
    top_n: Option<usize>,
    #[serde(default)]
    return_documents: bool,
    #[serde(flatten)]
    common: Common,
}

/// A text, alone or as a field.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, or an object with a text")]
enum Document {
    Text(String),
    Object { text: String },
}

fn rerank_cohere(body: RerankCohere) -> Result<Asks, Refusal> {
    let RerankCohere { query, documents, top_n, return_documents, common } = body;
    let plain = |document| match document {
        Document::Text(text) | Document::Object { text } => text,
    };
    let texts: Vec<String> = documents.into_iter().map(plain).collect();
    let records = texts.iter().map(|text| pair(query.clone(), text.clone())).collect();
    let top = top_n.unwrap_or(texts.len());
    let form = Form::Ranks { raw: false, manner: Ranks::Cohere, texts, top, with_texts: return_documents };
    Ok(common.asks(records, form))
}

#[derive(Deserialize)]
struct OpenAiEmbeddings {
    input: OneOrMany<String>,
    model: Option<String>,
    #[serde(default)]
    encoding_format: Encoding,
    dimensions: Option<usize>,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
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

#[derive(Deserialize)]
struct Infer {
    id: Option<String>,
    inputs: Vec<Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    datatype: String,
    shape: Vec<usize>,
    data: Option<Vec<String>>,
}

/// Texts as tensors of bytes: an input a field of the records.
fn infer(Infer { id, inputs }: Infer) -> Result<Asks, Refusal> {
    let count = inputs.first().and_then(|tensor| tensor.data.as_ref()).map_or(0, Vec::len);
    let mut records = vec![Record::new(); count];
    for Tensor { name, datatype, shape, data } in inputs {
        if datatype != "BYTES" {
            return Err(Refusal::invalid(format!(
                "{name}: datatype {datatype}, expected BYTES: a text a record"
            )));
        }
        let Some(data) = data else {
            return Err(Refusal::invalid(format!(
                "{name}: there is no data; texts stand in the JSON, as tritonclient sends them with binary_data=False"
            )));
        };
        let size = shape.iter().try_fold(1usize, |size, dim| size.checked_mul(*dim));
        if size != Some(data.len()) || data.len() != count {
            return Err(Refusal::invalid(format!(
                "{name}: {} texts of shape {shape:?}, expected {count} of shape [{count}]",
                data.len()
            )));
        }
        for (record, value) in records.iter_mut().zip(data) {
            if record.insert(name.clone(), Value::String(value)).is_some() {
                return Err(Refusal::invalid(format!("two inputs are named {name}")));
            }
        }
    }
    Ok(Asks { records, truncate: true, model: None, form: Form::Tensor { id } })
}

impl Form {
    /// The body that answers a request of a model of this name, in so many tokens.
    ///
    /// # Errors
    /// An answer has no such field: the model is of another kind.
    pub fn body(self, answers: Vec<Record>, model: &str, tokens: usize) -> Result<Value, Refusal> {
        match self {
            Self::Labels { single, raw } => one_or_all(
                answers.iter().map(|answer| labels(answer, raw)).collect::<Result<_, _>>()?,
                single,
            ),
            Self::Field { single, name } => one_or_all(
                answers.into_iter().map(|answer| field(answer, name)).collect::<Result<_, _>>()?,
                single,
            ),
            Self::Whole { single } => one_or_all(answers.into_iter().map(Value::Object).collect(), single),
            Self::Embeddings { normalize } => {
                let row = |answer| {
                    let row = numbers(answer, "embedding")?;
                    Ok(written(&if normalize { of_length_one(row) } else { row }))
                };
                Ok(Value::Array(answers.into_iter().map(row).collect::<Result<_, Refusal>>()?))
            }
            Self::OpenAiEmbeddings { base64, dimensions } => {
                let row = |(index, answer)| {
                    let mut row = numbers(answer, "embedding")?;
                    if let Some(width) = dimensions {
                        if width > row.len() {
                            return Err(Refusal::invalid(format!(
                                "dimensions: {width}, and the model's embeddings have {}",
                                row.len()
                            )));
                        }
                        row.truncate(width);
                        row = of_length_one(row);
                    }
                    let bytes = || row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
                    let embedding = if base64 { json!(STANDARD.encode(bytes())) } else { written(&row) };
                    Ok(json!({"object": "embedding", "embedding": embedding, "index": index}))
                };
                let data = answers.into_iter().enumerate().map(row).collect::<Result<Vec<_>, _>>()?;
                let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
                Ok(json!({"object": "list", "data": data, "model": model, "usage": usage}))
            }
            Self::Similarities => {
                let of = |answer| field(answer, "similarity");
                Ok(Value::Array(answers.into_iter().map(of).collect::<Result<_, _>>()?))
            }
            Self::Ranks { raw, manner, texts, top, with_texts } => {
                let score = |answer: &Record| relevance(answer, raw);
                let mut ranks: Vec<(usize, f64)> = answers
                    .iter()
                    .map(score)
                    .collect::<Result<Vec<_>, _>>()?
                    .into_iter()
                    .enumerate()
                    .collect();
                // stable, so that equal ones keep their order
                ranks.sort_by(|(_, a), (_, b)| b.total_cmp(a));
                ranks.truncate(top);
                let rank = |(index, score): (usize, f64)| {
                    let text = texts.get(index).filter(|_| with_texts);
                    match (manner, text) {
                        (Ranks::Tei, None) => json!({"index": index, "score": score}),
                        (Ranks::Tei, Some(text)) => json!({"index": index, "score": score, "text": text}),
                        (Ranks::Cohere, None) => json!({"index": index, "relevance_score": score}),
                        (Ranks::Cohere, Some(text)) => {
                            json!({"index": index, "relevance_score": score, "document": {"text": text}})
                        }
                    }
                };
                let ranks: Vec<Value> = ranks.into_iter().map(rank).collect();
                Ok(match manner {
                    Ranks::Tei => Value::Array(ranks),
                    Ranks::Cohere => {
                        json!({"model": model, "results": ranks, "usage": {"total_tokens": tokens}})
                    }
                })
            }
            Self::Tensor { id } => {
                let data: Vec<String> = answers.iter().map(|answer| json!(answer).to_string()).collect();
                let output =
                    json!({"name": "answer", "datatype": "BYTES", "shape": [data.len()], "data": data});
                let mut body = json!({"model_name": model, "model_version": "1", "outputs": [output]});
                if let Some(id) = id {
                    body["id"] = Value::String(id);
                }
                Ok(body)
            }
        }
    }
}

fn one_or_all(mut bodies: Vec<Value>, single: bool) -> Result<Value, Refusal> {
    match (single, bodies.pop()) {
        (true, Some(body)) => Ok(body),
        (_, last) => {
            bodies.extend(last);
            Ok(Value::Array(bodies))
        }
    }
}

fn other_kind(name: &str) -> Refusal {
    Refusal::backend(format!("the model's answers have no \"{name}\": it is trained for another task"))
}

fn field(mut answer: Record, name: &str) -> Result<Value, Refusal> {
    answer.remove(name).ok_or_else(|| other_kind(name))
}

fn numbers(answer: Record, name: &str) -> Result<Vec<f32>, Refusal> {
    let Value::Array(row) = field(answer, name)? else { return Err(other_kind(name)) };
    row.iter().map(|x| x.as_f64().map(|x| x as f32).ok_or_else(|| other_kind(name))).collect()
}

fn written(row: &[f32]) -> Value {
    row.iter().map(|&x| short(x)).collect()
}

fn of_length_one(mut row: Vec<f32>) -> Vec<f32> {
    let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
    row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    row
}

/// Labels with their scores, best first.
fn labels(answer: &Record, raw: bool) -> Result<Value, Refusal> {
    let Some(Value::Object(scores)) = answer.get("scores") else {
        // a number, which has no label
        let score = answer.get("score").ok_or_else(|| other_kind("scores"))?;
        return Ok(json!([{"score": score}]));
    };
    let mut labels: Vec<(&String, f64)> = match answer.get("logits") {
        Some(Value::Array(logits)) if raw => {
            scores.keys().zip(logits.iter().map(|x| x.as_f64().unwrap_or_default())).collect()
        }
        _ if raw => return Err(Refusal::backend("the model gives no raw scores")),
        _ => scores.iter().map(|(label, x)| (label, x.as_f64().unwrap_or_default())).collect(),
    };
    labels.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    Ok(labels.into_iter().map(|(label, score)| json!({"score": score, "label": label})).collect())
}

/// How relevant a text is: of a model with one output, its sigmoid or itself.
fn relevance(answer: &Record, raw: bool) -> Result<f64, Refusal> {
    match (answer.get("scores"), answer.get("score").and_then(Value::as_f64)) {
        (None, Some(score)) if raw => Ok(score),
        (None, Some(score)) => Ok(1.0 / (1.0 + (-score).exp())),
        _ => Err(Refusal::backend(
            "texts are ranked by a model that gives one number to a pair; this one gives labels",
        )),
    }
}
