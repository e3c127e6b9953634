//! The Open Inference Protocol's `infer`: a body of tensors → records, or a graph's own inputs → answers, or its own
//! outputs, as tensors. Tensors stand in the JSON, or as binary data behind it.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::answers::Inferred;
use super::compute::at_leisure;
use super::refusal::{Manner, Refusal};
use super::routes::{Record, parsed};
use super::served::{Ask, Told};
use super::status::ModelName;
use super::tensor::{Elements, Input, InputTensor, JSON_LENGTH, Output, OutputData};
use super::{App, Served, put};

/// What answers to records are called.
pub(super) const ANSWER: &str = "answer";

/// Tensors: of texts, one a field of the records; or of tokens, as the model's graph takes them.
#[derive(Deserialize, ToSchema)]
pub(super) struct InferBody {
    id: Option<String>,
    inputs: Vec<InputTensor>,
    /// All where none is named.
    outputs: Option<Vec<AskedOutput>>,
    parameters: Option<InferParameters>,
}

#[derive(Deserialize, ToSchema)]
struct AskedOutput {
    name: String,
    parameters: Option<OutputForm>,
}

#[derive(Deserialize, ToSchema)]
struct OutputForm {
    /// Whether it stands behind the JSON.
    binary_data: Option<bool>,
    /// Refused, but for 0: labels are what texts are answered with.
    classification: Option<u64>,
    /// Refused: there is no shared memory.
    shared_memory_region: Option<String>,
}

#[derive(Deserialize, ToSchema)]
struct InferParameters {
    /// Whether outputs stand behind the JSON where nothing is said of them.
    binary_data_output: Option<bool>,
}

/// What a request asks.
pub struct Inference {
    id: Option<String>,
    pub inputs: Vec<Input>,
    /// The outputs that are named, and whether each is wanted as binary data.
    outputs: Vec<(String, bool)>,
    /// The same of those that are not.
    binary: bool,
}

impl Inference {
    /// Reads a body, of which so many bytes are JSON, or all of them.
    ///
    /// # Errors
    /// It is no JSON, or a tensor does not fit its shape.
    pub fn read(body: &[u8], json_length: Option<usize>) -> Result<Self, Refusal> {
        let length = json_length.unwrap_or(body.len());
        let Some((json, mut binary)) = body.split_at_checked(length) else {
            return Err(Refusal::invalid(format!(
                "{JSON_LENGTH} is {length}, and the body has {} bytes",
                body.len()
            )));
        };
        let InferBody { id, inputs, outputs, parameters } = parsed(json)?;
        let inputs = inputs.into_iter().map(|input| input.read(&mut binary)).collect::<Result<_, _>>()?;
        if !binary.is_empty() {
            return Err(Refusal::invalid(format!("{} bytes behind the last tensor", binary.len())));
        }
        let by_default = parameters.and_then(|parameters| parameters.binary_data_output).unwrap_or(false);
        let outputs = outputs.unwrap_or_default().into_iter().map(|output| output.read(by_default));
        Ok(Self { id, inputs, outputs: outputs.collect::<Result<_, _>>()?, binary: by_default })
    }
}

impl AskedOutput {
    fn read(self, binary: bool) -> Result<(String, bool), Refusal> {
        let Self { name, parameters } = self;
        let Some(OutputForm { binary_data, classification, shared_memory_region }) = parameters else {
            return Ok((name, binary));
        };
        if shared_memory_region.is_some() {
            return Err(Refusal::invalid(format!("{name}: there is no shared memory here")));
        }
        if classification.is_some_and(|classes| classes > 0) {
            return Err(Refusal::invalid(format!(
                "{name}: classification is not here: labels are in the answers to texts"
            )));
        }
        Ok((name, binary_data.unwrap_or(binary)))
    }
}

/// How many bytes of the body are JSON.
fn json_length(headers: &HeaderMap) -> Result<Option<usize>, Refusal> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    let wrong = || Refusal::invalid(format!("{JSON_LENGTH} is {value:?}, expected the bytes of the JSON"));
    Ok(Some(length.ok_or_else(wrong)?))
}

/// Asks the model that the path names.
pub(super) async fn infer(
    State(app): State<Arc<App>>,
    ModelName(name): ModelName,
    request: Request,
) -> Response {
    let heard = app.heard(&request, "/v2/models/{model}/infer", Manner::Inference);
    let inferred = async {
        let length = json_length(request.headers());
        let body = app.body(request).await?;
        let (model, length) = (app.model(name.as_deref())?, length?);
        let inference = at_leisure(body.len(), || Inference::read(&body, length))?;
        let of_graph = |input: &Input| model.signature.inputs.contains(&input.name);
        match inference.inputs.iter().any(of_graph) {
            true => app.run(&model, inference, body.len()).await,
            false => app.answer_texts(&model, inference, body.len()).await,
        }
    };
    app.counted(heard, inferred).await
}

impl App {
    /// Runs the model's graph on what it takes.
    async fn run(&self, model: &Served, inference: Inference, bytes: usize) -> Result<Response, Refusal> {
        let started = Instant::now();
        let Inference { id, inputs, outputs, binary } = inference;
        let signature = &model.signature;
        let chosen: Arc<[usize]> = signature.chosen(outputs.iter().map(|(name, _)| name.as_str()))?.into();
        let rows = at_leisure(bytes, || signature.rows(inputs))?;
        self.check_count(rows.sequences.len(), "rows")?;
        self.check_tokens(rows.sequences.iter().map(|row| row.len()).sum())?;
        signature.check_size(&chosen, &rows)?;
        let width = rows.width;
        let ask = |row| Ask::Tokens { row, outputs: chosen.clone() };
        let asked = rows.sequences.into_iter().map(ask).collect();
        let read = started.elapsed();
        let mut computed = self.compute(model, asked).await?;
        let outputs_of = |told| match told {
            Told::Outputs(outputs) => Ok(outputs),
            Told::Answer(_) => Err(Refusal::backend("the model gave an answer and no outputs")),
        };
        let told = std::mem::take(&mut computed.told).into_iter().map(outputs_of);
        let told = told.collect::<Result<Vec<_>, _>>()?;
        let numbers = told.iter().flatten().map(|output| output.len()).sum::<usize>();
        let forms = (0..chosen.len()).map(|i| outputs.get(i).map_or(binary, |(_, binary)| *binary));
        let response = at_leisure(numbers * size_of::<f32>(), || {
            inferred(model, id, signature.tensors(&chosen, &told, width).into_iter().zip(forms))
        })?;
        Ok(computed.with_headers(model, read, response))
    }

    /// Answers texts, whose tensors are the fields of records.
    async fn answer_texts(
        &self,
        model: &Served,
        inference: Inference,
        bytes: usize,
    ) -> Result<Response, Refusal> {
        let Inference { id, inputs, outputs, binary } = inference;
        if let Some((other, _)) = outputs.iter().find(|(name, _)| name != ANSWER) {
            return Err(Refusal::invalid(format!("there is no output {other:?} of texts, but {ANSWER:?}")));
        }
        let records = records(model, inputs)?;
        let started = Instant::now();
        let asked = at_leisure(bytes, || self.read(model, records, true))?;
        let tokenized = started.elapsed();
        let mut computed = self.compute(model, asked).await?;
        let answers: Vec<String> =
            computed.answers()?.into_iter().map(|answer| Value::Object(answer).to_string()).collect();
        let binary = outputs.first().map_or(binary, |(_, binary)| *binary);
        let answers = Output { name: ANSWER, shape: vec![answers.len()], data: OutputData::Texts(answers) };
        let response = inferred(model, id, [(answers, binary)].into_iter())?;
        Ok(computed.with_headers(model, tokenized, response))
    }
}

/// The records whose fields the tensors are.
fn records(model: &Served, inputs: Vec<Input>) -> Result<Vec<Record>, Refusal> {
    let fields = model.task.fields_asked();
    let mut records: Vec<Record> = Vec::new();
    for (i, Input { name, shape, elements }) in inputs.into_iter().enumerate() {
        if !fields.contains(&name.as_str()) {
            return Err(Refusal::invalid(format!(
                "{} takes no input {name:?}, but {}; or its graph's own: {}",
                model.name,
                fields.join(" and "),
                model.signature.inputs.join(", ")
            )));
        }
        let Elements::Texts(texts) = elements else {
            return Err(Refusal::invalid(format!("{name}: integers, expected BYTES: a text a record")));
        };
        if i == 0 {
            records = vec![Record::new(); texts.len()];
        }
        if texts.len() != records.len() {
            return Err(Refusal::invalid(format!(
                "{name}: {} texts of the shape {shape:?}, expected {}, as of the first input",
                texts.len(),
                records.len()
            )));
        }
        for (record, text) in records.iter_mut().zip(texts) {
            if record.insert(name.clone(), Value::String(text)).is_some() {
                return Err(Refusal::invalid(format!("two inputs are named {name}")));
            }
        }
    }
    if records.is_empty() {
        return Err(Refusal::empty("there is no text in it"));
    }
    Ok(records)
}

/// The response of outputs, those behind the JSON that are wanted so.
fn inferred(
    model: &Served,
    id: Option<String>,
    outputs: impl Iterator<Item = (Output, bool)>,
) -> Result<Response, Refusal> {
    let (mut behind, mut is_binary) = (Vec::new(), false);
    let outputs = outputs.map(|(output, binary)| {
        is_binary |= binary;
        output.write(binary.then_some(&mut behind))
    });
    let outputs = outputs.collect();
    let inferred = Inferred { model_name: model.name.clone(), model_version: "1", id, outputs };
    let json = serde_json::to_vec(&inferred);
    let mut body = json.map_err(|error| Refusal::failed(format!("the answer can't be written: {error}")))?;
    if !is_binary {
        return Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response());
    }
    let length = body.len();
    body.append(&mut behind);
    let mut response = ([(header::CONTENT_TYPE, BINARY)], body).into_response();
    put(response.headers_mut(), JSON_LENGTH, &length.to_string());
    Ok(response)
}

/// The type of bodies with binary data.
pub(super) const BINARY: &str = "application/octet-stream";
