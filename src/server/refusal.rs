//! Why a request gets no answer: a status, a kind, a message, in the form that the route's clients know.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

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

/// An error as clients of text-embeddings-inference know it.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TeiError<'r> {
    error: &'r str,
    /// `Validation`, `Empty`, `Backend`, `Overloaded`, `Unhealthy` or `Unauthorized`
    error_type: &'r str,
}

/// An error as clients of OpenAI know it.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenAiErrorBody<'r> {
    error: OpenAiError<'r>,
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenAiError<'r> {
    message: &'r str,
    /// `invalid_request_error` or `server_error`
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<String>,
}

/// An error as clients of the Open Inference Protocol know it.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceError<'r> {
    error: &'r str,
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

    /// The model failed in the middle of its answer, or the server did.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, ..Self::backend(message) }
    }

    /// There is nothing of this name.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, kind: "Validation", message: message.into() }
    }

    /// There is something of this name, but it is asked for otherwise.
    pub fn other_method() -> Self {
        let message = "this address is asked by another method: see the header `Allow`".to_owned();
        Self { status: StatusCode::METHOD_NOT_ALLOWED, kind: "Validation", message }
    }

    /// The key is missing or another one.
    pub fn unauthorized() -> Self {
        let message = "this server asks for a key: give the header `Authorization: Bearer KEY`".to_owned();
        Self { status: StatusCode::UNAUTHORIZED, kind: "Unauthorized", message }
    }

    /// Nobody may do this here.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self { status: StatusCode::FORBIDDEN, kind: "Unauthorized", message: message.into() }
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
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    /// What its body says.
    pub(super) fn body(&self, manner: Manner) -> Value {
        let Self { status, kind, message } = self;
        match manner {
            Manner::Tei => json!(TeiError { error: message, error_type: kind }),
            Manner::OpenAi => {
                let kind = if status.is_client_error() { "invalid_request_error" } else { "server_error" };
                json!(OpenAiErrorBody { error: OpenAiError { message, kind, param: None, code: None } })
            }
            Manner::Inference => json!(InferenceError { error: message }),
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
