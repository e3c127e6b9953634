//! What is told of the server and its models.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::refusal::{Manner, Refusal};

/// The process answers.
pub(super) async fn live() -> Response {
    axum::Json(json!({"live": true})).into_response()
}

/// Requests are taken: all models are loaded and have answered, and nothing is about to stop.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.ready.load(Ordering::Relaxed);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(json!({"live": true, "ready": ready}))).into_response()
}

pub(super) async fn info(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(refusal) = app.check_key(&headers) {
        return refusal.response(Manner::Tei);
    }
    let about = app.models.iter().map(|model| &model.about);
    let about: Vec<&Value> = about.chain(app.generators.iter().map(|model| &model.about)).collect();
    match about[..] {
        [only] => axum::Json(only).into_response(),
        _ => axum::Json(json!({"models": about})).into_response(),
    }
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let waiting = app.models.iter().map(|model| (model.name.as_str(), model.queue.len()));
    let waiting = waiting.chain(app.generators.iter().map(|model| (model.name.as_str(), model.under_way())));
    match app.meter.text(waiting) {
        Ok(text) => {
            let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, form)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

pub(super) async fn models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(refusal) = app.check_key(&headers) {
        return refusal.response(Manner::OpenAi);
    }
    let model = |name| json!({"id": name, "object": "model", "created": 0, "owned_by": "tk"});
    let data: Vec<Value> = app.names().map(model).collect();
    axum::Json(json!({"object": "list", "data": data})).into_response()
}

pub(super) async fn server() -> Response {
    axum::Json(json!({"name": "tk", "version": env!("CARGO_PKG_VERSION"), "extensions": []})).into_response()
}

pub(super) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let found = app.check_key(&headers).and_then(|()| app.model(Some(&name)));
    let tensor = |name| json!({"name": name, "datatype": "BYTES", "shape": [-1]});
    match found {
        Ok(model) => axum::Json(json!({
            "name": model.name,
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": model.task.fields_asked().iter().map(tensor).collect::<Vec<_>>(),
            "outputs": [tensor(&"answer")],
        }))
        .into_response(),
        Err(refusal) => refusal.response(Manner::Inference),
    }
}

pub(super) async fn model_ready(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    match app.model(Some(&name)) {
        Ok(model) => {
            let ready = app.ready.load(Ordering::Relaxed);
            let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (status, axum::Json(json!({"name": model.name, "ready": ready}))).into_response()
        }
        Err(refusal) => refusal.response(Manner::Inference),
    }
}

pub(super) async fn index(State(app): State<Arc<App>>) -> Response {
    let names: Vec<&str> = app.names().collect();
    axum::Json(json!({"tk": env!("CARGO_PKG_VERSION"), "models": names})).into_response()
}

pub(super) async fn nothing() -> Response {
    Refusal::unknown("there is nothing at this address").response(Manner::Tei)
}
