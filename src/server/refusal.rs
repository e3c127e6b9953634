//! Why a request gets no answer: a status, a kind, a message, in the form that the route's clients know.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::queue::Refused;

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    /// text-embeddings-inference's word for it.
    pub kind: &'static str,
    pub message: String,
}

/// Whose form an error has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// `{"error", "error_type"}`
    Tei,
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// `{"error"}`
    Inference,
}

/// Seconds after which a client may ask again where there was no room.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl Refusal {
    /// The request is not understood.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { status: StatusCode::UNPROCESSABLE_ENTITY, kind: "Validation", message: message.into() }
    }

    /// Nothing is asked for.
    pub fn empty(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "Empty", message: message.into() }
    }

    /// More is asked for than is allowed.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, kind: "Validation", message: message.into() }
    }

    /// The model is of another kind, or failed.
    pub fn backend(message: impl Into<String>) -> Self {
        Self { status: StatusCode::FAILED_DEPENDENCY, kind: "Backend", message: message.into() }
    }

    /// There is nothing of this name.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, kind: "Validation", message: message.into() }
    }

    /// The key is missing or another one.
    pub fn unauthorized() -> Self {
        let message = "this server asks for a key: give the header `Authorization: Bearer KEY`".to_owned();
        Self { status: StatusCode::UNAUTHORIZED, kind: "Unauthorized", message }
    }

    /// The model took too long.
    pub fn late(seconds: f64) -> Self {
        let message = format!("there was no answer after {seconds} s");
        Self { status: StatusCode::SERVICE_UNAVAILABLE, kind: "Overloaded", message }
    }

    /// The answer as clients of the route read it.
    pub fn response(&self, manner: Manner) -> Response {
        let mut response = (self.status, axum::Json(self.body(manner))).into_response();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }

    fn body(&self, manner: Manner) -> Value {
        let Self { status, kind, message } = self;
        match manner {
            Manner::Tei => json!({"error": message, "error_type": kind}),
            Manner::OpenAi => {
                let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
                json!({"error": {"message": message, "type": kind, "param": null, "code": null}})
            }
            Manner::Inference => json!({"error": message}),
        }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self {
                status: StatusCode::TOO_MANY_REQUESTS,
                kind: "Overloaded",
                message: "too many records wait already: ask again later".to_owned(),
            },
            Refused::Closed => Self {
                status: StatusCode::SERVICE_UNAVAILABLE,
                kind: "Unhealthy",
                message: "the server is about to stop".to_owned(),
            },
        }
    }
}
