//! SQuAD's JSON: articles of paragraphs of questions → a row a question.

use serde_json::Value;

use super::{BadRow, Row, describe};

/// Whether these are SQuAD's articles.
pub(super) fn is_squad(records: &[Value]) -> bool {
    !records.is_empty()
        && records.iter().all(|article| article.get("paragraphs").is_some_and(Value::is_array))
}

/// A row for each question, with its own fields (`id`, `question`, `answers` …) and the `title` and `context` that it
/// stands under. Questions are counted from 1.
pub(super) fn questions(articles: Vec<Value>) -> impl Iterator<Item = Result<Row, BadRow>> {
    let paragraphs = articles.into_iter().flat_map(|mut article| {
        let title = article.get("title").cloned();
        let paragraphs = match article.get_mut("paragraphs").map(Value::take) {
            Some(Value::Array(paragraphs)) => paragraphs,
            _ => Vec::new(),
        };
        paragraphs.into_iter().map(move |paragraph| (title.clone(), paragraph))
    });
    let rows = paragraphs.flat_map(|(title, mut paragraph)| {
        let context = paragraph.get("context").cloned();
        let questions = match paragraph.get_mut("qas").map(Value::take) {
            Some(Value::Array(questions)) => questions,
            // the paragraph's fault is one row's
            other => vec![other.unwrap_or(Value::Null)],
        };
        questions.into_iter().map(move |question| (title.clone(), context.clone(), question))
    });
    rows.enumerate().map(|(i, (title, context, question))| {
        let line = i + 1;
        let Value::Object(mut fields) = question else {
            let message = format!("a question of SQuAD is {}; an object was expected", describe(&question));
            return Err(BadRow { line, message });
        };
        fields.extend(
            [("title", title), ("context", context)]
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?))),
        );
        Ok(Row::new(line, fields))
    })
}
