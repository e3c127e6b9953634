//! The bodies of answers, as they are written and as the document of the server describes them.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::tensor::OutputTensor;

/// A label with its score. A regression's number has no label.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Label {
    pub score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub label: Option<String>,
}

/// A text's place among the ranks.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rank {
    /// Which of the texts.
    pub index: usize,
    pub score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub text: Option<String>,
}

/// Cohere's ranks.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CohereRanks {
    pub model: String,
    /// From the best.
    pub results: Vec<CohereRank>,
    pub usage: TotalTokens,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CohereRank {
    /// Which of the documents.
    pub index: usize,
    pub relevance_score: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub document: Option<RankedDocument>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RankedDocument {
    pub text: String,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TotalTokens {
    pub total_tokens: usize,
}

/// OpenAI's embeddings.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Embeddings {
    /// `list`
    pub object: &'static str,
    pub data: Vec<EmbeddingRow>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingRow {
    /// `embedding`
    pub object: &'static str,
    /// Numbers; or with `base64` the bytes of f32, the lowest first.
    #[schema(value_type = EmbeddingNumbers)]
    pub embedding: Value,
    pub index: usize,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "describes the two encodings of an embedding")]
pub enum EmbeddingNumbers {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
}

/// The Open Inference Protocol's answer: a tensor of texts, each the JSON of a record's answer; or the graph's outputs.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Inferred {
    pub model_name: String,
    pub model_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub id: Option<String>,
    pub outputs: Vec<OutputTensor>,
}

/// A token of a text.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Token {
    pub id: u32,
    pub text: String,
    /// Whether the tokenizer has put it there.
    pub special: bool,
    /// Where it begins, in characters; a special token stands nowhere.
    pub start: Option<usize>,
    /// Behind its last character.
    pub stop: Option<usize>,
}

/// What a model is.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelInfo {
    /// What requests call it.
    pub model_id: String,
    /// SHA-256 of the weights that the graph was made of.
    pub model_sha: Option<String>,
    /// The graph's precision.
    pub model_dtype: &'static str,
    pub task: &'static str,
    /// The labels by their ids, where the model has some.
    #[schema(value_type = Option<Object>)]
    pub id2label: Option<Value>,
    /// What stands for a mask, where the model fills masks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub mask_token: Option<String>,
    /// What computes.
    pub provider: &'static str,
    /// Tokens of the longest text, or of the longest prompt.
    pub max_input_length: usize,
    /// Padded tokens of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub max_batch_tokens: Option<usize>,
    /// Whether longer texts are cut where a request says nothing.
    pub auto_truncate: bool,
    /// The server's version.
    pub version: &'static str,
}

/// The only model; or all of them.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Info {
    One(Box<ModelInfo>),
    Many(ModelInfos),
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelInfos {
    pub models: Vec<ModelInfo>,
}

/// OpenAI's list of models.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListedModels {
    /// `list`
    pub object: &'static str,
    pub data: Vec<ListedModel>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListedModel {
    pub id: String,
    /// `model`
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
}

/// The process answers.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Live {
    pub live: bool,
}

/// Whether requests are taken.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    pub live: bool,
    pub ready: bool,
}

/// The Open Inference Protocol's word on a server.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceServer {
    pub name: &'static str,
    pub version: &'static str,
    pub extensions: Vec<&'static str>,
}

/// The Open Inference Protocol's word on a model.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceModel {
    pub name: String,
    pub versions: Vec<&'static str>,
    pub platform: &'static str,
    pub inputs: Vec<TensorShape>,
    pub outputs: Vec<TensorShape>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorShape {
    pub name: String,
    pub datatype: &'static str,
    /// −1 is any size.
    pub shape: Vec<i64>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceReady {
    pub name: String,
    pub ready: bool,
}
