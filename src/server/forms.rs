//! Answers → bodies. What a record is answered is the same as in `tk serve-batch`; here it takes the forms that clients of
//! text-embeddings-inference, OpenAI, Cohere and the Open Inference Protocol know.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::refusal::Refusal;
use super::routes::Record;
use crate::task::scores::{short, to_length_one};

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

impl Form {
    /// The body that answers a request of a model of this name, in so many tokens.
    ///
    /// # Errors
    /// An answer has no such field: the model is of another kind.
    pub fn body(self, answers: Vec<Record>, model: &str, tokens: usize) -> Result<Value, Refusal> {
        match self {
            Self::Labels { single, raw } => {
                let labels = answers.iter().map(|answer| labels(answer, raw));
                Ok(one_or_all(labels.collect::<Result<_, _>>()?, single))
            }
            Self::Field { single, name } => {
                let fields = answers.into_iter().map(|answer| field(answer, name));
                Ok(one_or_all(fields.collect::<Result<_, _>>()?, single))
            }
            Self::Whole { single } => {
                Ok(one_or_all(answers.into_iter().map(Value::Object).collect(), single))
            }
            Self::Embeddings { normalize } => {
                let row = |answer| {
                    let mut row = numbers(answer, "embedding")?;
                    if normalize {
                        to_length_one(&mut row);
                    }
                    Ok(written(&row))
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
                        to_length_one(&mut row);
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
                let scores = answers.iter().enumerate().map(|(i, answer)| Ok((i, relevance(answer, raw)?)));
                let mut ranks = scores.collect::<Result<Vec<(usize, f64)>, Refusal>>()?;
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

fn one_or_all(mut bodies: Vec<Value>, single: bool) -> Value {
    match bodies.pop_if(|_| single) {
        Some(body) => body,
        None => Value::Array(bodies),
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
