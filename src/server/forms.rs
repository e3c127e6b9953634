//! Answers → bodies. What a record is answered is the same as in `tk serve-batch`; here it takes the forms that clients of
//! text-embeddings-inference, OpenAI and Cohere know.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::answers::{
    CohereRank, CohereRanks, EmbeddingRow, EmbeddingUsage, Embeddings, Label, Rank, RankedDocument,
    TotalTokens,
};
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
                    Ok(EmbeddingRow { object: "embedding", embedding, index })
                };
                let data = answers.into_iter().enumerate().map(row).collect::<Result<_, Refusal>>()?;
                let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
                Ok(json!(Embeddings { object: "list", data, model: model.to_owned(), usage }))
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
                let text = |index: usize| texts.get(index).filter(|_| with_texts).cloned();
                let ranks = ranks.into_iter();
                Ok(match manner {
                    Ranks::Tei => {
                        ranks.map(|(index, score)| json!(Rank { index, score, text: text(index) })).collect()
                    }
                    Ranks::Cohere => {
                        let rank = |(index, relevance_score)| {
                            let document = text(index).map(|text| RankedDocument { text });
                            CohereRank { index, relevance_score, document }
                        };
                        let usage = TotalTokens { total_tokens: tokens };
                        json!(CohereRanks {
                            model: model.to_owned(),
                            results: ranks.map(rank).collect(),
                            usage
                        })
                    }
                })
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
        let score = answer.get("score").and_then(Value::as_f64).ok_or_else(|| other_kind("scores"))?;
        return Ok(json!([Label { score, label: None }]));
    };
    let mut labels: Vec<(&String, f64)> = match answer.get("logits") {
        Some(Value::Array(logits)) if raw => {
            scores.keys().zip(logits.iter().map(|x| x.as_f64().unwrap_or_default())).collect()
        }
        _ if raw => return Err(Refusal::backend("the model gives no raw scores")),
        _ => scores.iter().map(|(label, x)| (label, x.as_f64().unwrap_or_default())).collect(),
    };
    labels.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let label = |(label, score): (&String, f64)| json!(Label { score, label: Some(label.clone()) });
    Ok(labels.into_iter().map(label).collect())
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
