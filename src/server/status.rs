//! What is told of the server and its models.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{FromRequestParts, RawPathParams, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::App;
use super::answers::{
    InferenceModel, InferenceReady, InferenceServer, Info, ListedModel, ListedModels, Live, ModelInfo,
    ModelInfos, Ready, TensorShape,
};
use super::inference::ANSWER;
use super::refusal::{Manner, Refusal};
use super::signature::{self, Signature};
use crate::task::Output;

/// The process answers.
pub(super) async fn live() -> Response {
    axum::Json(Live { live: true }).into_response()
}

/// Requests are taken: all models are loaded and have answered, and nothing is about to stop.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let (status, ready) = readiness(&app);
    (status, axum::Json(Ready { live: true, ready })).into_response()
}

fn readiness(app: &App) -> (StatusCode, bool) {
    let ready = app.ready.load(Ordering::Relaxed);
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, ready)
}

pub(super) async fn info(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(refusal) = app.check_key(&headers) {
        return refusal.response(Manner::Tei);
    }
    let mut models: Vec<ModelInfo> = app.models.iter().map(|current| current.get().about().clone()).collect();
    let info = match models.len() {
        1 => Info::One(Box::new(models.remove(0))),
        _ => Info::Many(ModelInfos { models }),
    };
    axum::Json(info).into_response()
}

/// What Prometheus knows the counts by.
pub(super) const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let waiting = app.models.iter().map(|current| (current.name.as_str(), current.get().waiting()));
    counts(app.meter.text(waiting))
}

fn counts(text: Result<String, std::fmt::Error>) -> Response {
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => Refusal::failed(format!("the counts can't be written: {error}")).response(Manner::Tei),
    }
}

pub(super) async fn models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(refusal) = app.check_key(&headers) {
        return refusal.response(Manner::OpenAi);
    }
    let model = |id: &str| ListedModel { id: id.to_owned(), object: "model", created: 0, owned_by: "tk" };
    axum::Json(ListedModels { object: "list", data: app.names().map(model).collect() }).into_response()
}

pub(super) async fn server() -> Response {
    let about = InferenceServer {
        name: "tk",
        version: env!("CARGO_PKG_VERSION"),
        extensions: vec!["binary_tensor_data"],
    };
    axum::Json(about).into_response()
}

pub(super) async fn model(
    State(app): State<Arc<App>>,
    ModelName(name): ModelName,
    headers: HeaderMap,
) -> Response {
    let found = app.check_key(&headers).and_then(|()| app.model(name.as_deref()));
    let texts = |name: &str| TensorShape { name: name.to_owned(), datatype: "BYTES", shape: vec![-1] };
    let tokens = |name: &String| TensorShape { name: name.clone(), datatype: "INT64", shape: vec![-1, -1] };
    let numbers = |output: &Output| TensorShape {
        name: output.name.to_owned(),
        datatype: "FP32",
        shape: signature::any_shape(output),
    };
    match found {
        Ok(model) => {
            let Signature { inputs, outputs, .. } = &model.signature;
            let fields = model.task.fields_asked().iter().copied();
            axum::Json(InferenceModel {
                name: model.name.clone(),
                versions: vec!["1"],
                platform: "onnxruntime_onnx",
                inputs: fields.map(texts).chain(inputs.iter().map(tokens)).collect(),
                outputs: [texts(ANSWER)].into_iter().chain(outputs.iter().map(numbers)).collect(),
            })
            .into_response()
        }
        Err(refusal) => refusal.response(Manner::Inference),
    }
}

pub(super) async fn model_ready(State(app): State<Arc<App>>, ModelName(name): ModelName) -> Response {
    match app.model(name.as_deref()) {
        Ok(model) => {
            let (status, ready) = readiness(&app);
            (status, axum::Json(InferenceReady { name: model.name.clone(), ready })).into_response()
        }
        Err(refusal) => refusal.response(Manner::Inference),
    }
}

pub(super) async fn nothing() -> Response {
    Refusal::unknown("there is nothing at this address").response(Manner::Tei)
}

pub(super) async fn other_method() -> Response {
    Refusal::other_method().response(Manner::Tei)
}

/// The model that a path names, where it names one. What is no UTF-8 is the name of none that there is, and so is a version:
/// each model has one, 1.
pub(super) struct ModelName(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for ModelName {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let Ok(params) = RawPathParams::from_request_parts(parts, state).await else {
            return Ok(Self(Some(char::REPLACEMENT_CHARACTER.to_string())));
        };
        let of = |key: &str| params.iter().find(|(name, _)| *name == key).map(|(_, value)| value);
        Ok(Self(match (of("model"), of("version")) {
            (Some(model), Some(version)) if version != "1" => Some(format!("{model}, version {version}")),
            (model, _) => model.map(str::to_owned),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_can_not_be_written_are_an_error_as_others() {
        let response = counts(Err(std::fmt::Error));
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = runtime.block_on(axum::body::to_bytes(response.into_body(), 1000)).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["error_type"], "Backend");
        assert!(body["error"].as_str().unwrap().starts_with("the counts can't be written"), "{body}");
    }
}
