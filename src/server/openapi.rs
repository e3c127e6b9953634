//! The OpenAPI document: what each endpoint takes and answers, with the schemas of the types that read and write it.

use std::collections::BTreeMap;

use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ComponentsBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Content, ContentBuilder, HttpMethod, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, PathItem, Ref,
    RefOr, Required, ResponseBuilder,
};
use utoipa::{PartialSchema, ToSchema};

use super::api::{Answers, Endpoint};
use super::inference::BINARY;
use super::refusal::{InferenceError, Manner, OpenAiErrorBody, TeiError};
use super::tensor::JSON_LENGTH;

/// A JSON body: what it looks like, and what it refers to.
pub(super) struct Body {
    schema: RefOr<Schema>,
    named: Vec<(String, RefOr<Schema>)>,
}

/// A body that has a name of its own.
pub(super) fn of<T: ToSchema>() -> Body {
    let mut named = vec![(T::name().into_owned(), T::schema())];
    T::schemas(&mut named);
    Body { schema: reference::<T>(), named }
}

/// Numbers or texts.
pub(super) fn plain<T: PartialSchema>() -> Body {
    Body { schema: T::schema(), named: Vec::new() }
}

pub(super) fn list(Body { schema, named }: Body) -> Body {
    Body { schema: ArrayBuilder::new().items(schema).into(), named }
}

/// Of one record its answer, of several a list of answers.
pub(super) fn one_or_all(Body { schema, named }: Body) -> Body {
    let all = ArrayBuilder::new().items(schema.clone());
    let both = AnyOfBuilder::new().description(Some("Of one record its answer, of a list one each."));
    Body { schema: both.item(schema).item(all).into(), named }
}

pub(super) fn reference<T: ToSchema>() -> RefOr<Schema> {
    RefOr::Ref(Ref::from_schema_name(T::name()))
}

/// Headers of all requests that are counted.
const COUNTED: [(&str, &str); 2] =
    [("x-request-id", "The request's name: the client's, or one of its own"), ("x-total-time", MILLIS)];

/// Headers of answers that a model gave from its queue.
const COMPUTED: [(&str, &str); 5] = [
    ("x-compute-type", "What has computed: cpu, cuda, tensorrt"),
    ("x-compute-tokens", "Tokens of all records"),
    ("x-tokenization-time", MILLIS),
    ("x-queue-time", MILLIS),
    ("x-inference-time", MILLIS),
];

/// Headers of the page's files.
const OF_PAGE: [(&str, &str); 4] = [
    ("content-security-policy", "What the page may do"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-cache"),
];

const MILLIS: &str = "Milliseconds";

/// The document as JSON, of a server that asks for a key or does not.
///
/// # Errors
/// It can't be written.
pub(super) fn document(endpoints: Vec<Endpoint>, keyed: bool) -> serde_json::Result<String> {
    let errors = [of::<TeiError>(), of::<OpenAiErrorBody>(), of::<InferenceError>()];
    let mut named: Vec<_> = errors.into_iter().flat_map(|error| error.named).collect();
    let mut items: BTreeMap<String, PathItem> = BTreeMap::new();
    for endpoint in endpoints {
        for body in endpoint.body.iter().chain(endpoint.answers.body()) {
            named.extend(body.named.iter().cloned());
        }
        let item = PathItem::new(endpoint.method.clone(), operation(&endpoint, keyed));
        match items.get_mut(&endpoint.path) {
            Some(known) => known.merge_operations(item),
            None => drop(items.insert(endpoint.path, item)),
        }
    }
    let mut components = ComponentsBuilder::new().schemas_from_iter(named);
    if keyed {
        let key =
            HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("The key of the server"));
        components = components.security_scheme(KEY, SecurityScheme::Http(key.build()));
    }
    let paths = items.into_iter().fold(PathsBuilder::new(), |paths, (path, item)| paths.path(path, item));
    let info = InfoBuilder::new()
        .title("tk")
        .description(Some("Models that `tk serve` answers with."))
        .license(Some(LicenseBuilder::new().name(env!("CARGO_PKG_LICENSE")).build()))
        .version(env!("CARGO_PKG_VERSION"));
    let document: OpenApi = OpenApiBuilder::new()
        .info(info.build())
        .paths(paths.build())
        .components(Some(components.build()))
        .build();
    document.to_json()
}

/// What the document calls the key.
const KEY: &str = "key";

fn operation(endpoint: &Endpoint, keyed: bool) -> OperationBuilder {
    let Endpoint { path, summary, tag, body, answers, manner, refused, computed, .. } = endpoint;
    let mut operation = OperationBuilder::new().summary(Some(*summary)).tag(*tag);
    for (name, says) in [("model", "What the model is called"), ("version", "1: a model has one version")] {
        if path.contains(&format!("{{{name}}}")) {
            let parameter = ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Path)
                .required(Required::True)
                .description(Some(says))
                .schema(Some(text()));
            operation = operation.parameter(parameter);
        }
    }
    let binary = matches!(answers, Answers::JsonOrBinary(_));
    if let Some(body) = body {
        let mut request = RequestBodyBuilder::new().required(Some(Required::True));
        request = request.content(JSON, content(body.schema.clone()));
        if binary {
            request = request.content(BINARY, content(with_binary()));
            let length = ParameterBuilder::new()
                .name(JSON_LENGTH)
                .parameter_in(ParameterIn::Header)
                .description(Some("Bytes of the JSON, where binary data stands behind it"))
                .schema(Some(text()));
            operation = operation.parameter(length);
        }
        operation = operation.request_body(Some(request.build()));
    }
    let counted = endpoint.method == HttpMethod::Post;
    let mut good = ResponseBuilder::new().description(*summary);
    good = match answers {
        Answers::Json(body) => good.content(JSON, content(body.schema.clone())),
        Answers::Document => good.content(JSON, content(any_object())),
        Answers::Text(form) => good.content(*form, content(text())),
        Answers::Page(form) => OF_PAGE.iter().fold(good.content(*form, content(text())), with_header),
        Answers::JsonOrEvents(body) => {
            good.content(JSON, content(body.schema.clone())).content("text/event-stream", content(text()))
        }
        Answers::JsonOrBinary(body) => {
            good.content(JSON, content(body.schema.clone())).content(BINARY, content(with_binary()))
        }
    };
    if counted {
        good = COUNTED.iter().fold(good, with_header);
    }
    if *computed {
        good = COMPUTED.iter().fold(good, with_header);
    }
    operation = operation.response("200", good.build());
    let mut refused = refused.clone();
    if keyed && endpoint.keyed {
        let requirement = SecurityRequirement::new::<_, [&str; 0], &str>(KEY, []);
        operation = operation.security(requirement);
        refused.push((401, "The key is missing or another one"));
    }
    let error = match manner {
        Manner::Tei => reference::<TeiError>(),
        Manner::OpenAi => reference::<OpenAiErrorBody>(),
        Manner::Inference => reference::<InferenceError>(),
    };
    for (status, when) in refused {
        // what is not ready says so in the same form as what is
        let says = answers.body().filter(|_| status == 503 && !counted);
        let says = says.map_or_else(|| error.clone(), |body| body.schema.clone());
        let mut response = ResponseBuilder::new().description(when).content(JSON, content(says));
        if counted {
            response = COUNTED.iter().fold(response, with_header);
            if [429, 503].contains(&status) {
                response = with_header(response, &("retry-after", "Seconds to wait"));
            }
        }
        if status == 401 {
            response = with_header(response, &("www-authenticate", "Bearer"));
        }
        operation = operation.response(status.to_string(), response.build());
    }
    operation
}

const JSON: &str = "application/json";

fn content(schema: RefOr<Schema>) -> Content {
    ContentBuilder::new().schema(Some(schema)).build()
}

fn text() -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(Type::String).into()
}

/// JSON with binary data behind it.
fn with_binary() -> RefOr<Schema> {
    let says = "The JSON, of as many bytes as the header `Inference-Header-Content-Length` says, and behind it the data of \
                each tensor that has a `binary_data_size`, in their order.";
    ObjectBuilder::new().schema_type(Type::String).description(Some(says)).into()
}

fn any_object() -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(Type::Object).into()
}

fn with_header(response: ResponseBuilder, (name, description): &(&str, &str)) -> ResponseBuilder {
    let header = HeaderBuilder::new().schema(Some(text())).description(Some(*description));
    response.header(*name, header.build())
}
