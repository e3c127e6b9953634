//! A page to try the models in a browser: three files, without anything from elsewhere. It asks for the key itself, where
//! the server has one, so that the files need none.

use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};

/// The type of the page.
pub(super) const HTML: &str = "text/html; charset=utf-8";
/// The type of its script.
pub(super) const SCRIPT: &str = "text/javascript; charset=utf-8";
/// The type of its style.
pub(super) const STYLE: &str = "text/css; charset=utf-8";

/// What the page may do: its own script and style, and asking this server. The empty icon is a `data:` address.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Headers of all three: the policy, no guessing of types, no address told to others, and no old page with a new server.
const HEADERS: [(HeaderName, &str); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
];

pub(super) async fn html() -> Response {
    ([(header::CONTENT_TYPE, HTML)], HEADERS, include_str!("page/index.html")).into_response()
}

pub(super) async fn script() -> Response {
    ([(header::CONTENT_TYPE, SCRIPT)], HEADERS, include_str!("page/page.js")).into_response()
}

pub(super) async fn style() -> Response {
    ([(header::CONTENT_TYPE, STYLE)], HEADERS, include_str!("page/page.css")).into_response()
}
