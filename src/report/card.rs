//! A report as a model card: a `README.md` whose front matter the Hugging Face hub reads.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use indicatif::HumanCount;

use super::run::Started;
use super::{Report, file_name};
use crate::checkpoint::adapter;
use crate::{Result, bail_unusable, files};

/// What it is called in a model's directory.
pub const NAME: &str = "README.md";

/// Says that a card is tk's. Whoever takes it out keeps the file.
pub const MARK: &str =
    "<!-- Written by tk report, which replaces this file as long as this line stands here. -->";

/// Stands where the author has to say something.
const ASKED: &str = "[More information needed]";

/// Where the card of a directory is written.
///
/// # Errors
/// Unusable: a README.md stands there that is not tk's, and may not be replaced.
pub fn destination(dir: &Path, overwrite: bool) -> Result<PathBuf> {
    let path = files::behind_links(&dir.join(NAME))?;
    match files::beginning(&path)? {
        Some(text) if !overwrite && !text.contains(MARK) => {
            bail_unusable!("{} is not tk's: --overwrite replaces it, or move it away", path.display())
        }
        _ => Ok(path),
    }
}

/// The card.
pub fn markdown(report: &Report) -> String {
    let mut text = front_matter(report);
    let task = report.saved.task.name();
    let base = report.started.as_ref().and_then(Started::model);
    let from = base.map(|base| format!(", fine-tuned from `{}`", inline(&file_name(Path::new(base)))));
    // writing to a String can't fail
    let _ = write!(
        text,
        "{MARK}\n\n# {}\n\nA {} model for {task}{} by [tk](#training), with {} parameters.\n",
        inline(&report.name),
        inline(report.saved.config.family.model_type()),
        from.unwrap_or_default(),
        HumanCount(report.parameters as u64)
    );
    if let Some(summary) = report.saved.task.summary() {
        let _ = write!(text, "\nWhat it learnt: {}.\n", inline(&summary));
    }
    let _ = write!(text, "\n## Intended use\n\n{ASKED}: what it is for, and what it is not for.\n");
    if let Some((metrics, on)) = report.metrics() {
        let _ = write!(text, "\n## Metrics\n\nOn `{}`:\n\n| metric | value |\n| --- | --- |\n", inline(&on));
        for (name, value) in metrics {
            let _ = writeln!(text, "| {} | {value:.4} |", inline(name));
        }
    }
    if let Some(rows) = report.seen.as_ref().map(|seen| &seen.review.rows).filter(|rows| !rows.is_empty()) {
        let of = report.seen.as_ref().map_or("label", |seen| seen.review.rows_of);
        let _ =
            write!(text, "\n| {of} | precision | recall | F1 | wanted |\n| --- | --- | --- | --- | --- |\n");
        for row in rows.iter().take(ROWS) {
            let _ = writeln!(
                text,
                "| {} | {:.4} | {:.4} | {:.4} | {} |",
                inline(&row.label),
                row.precision,
                row.recall,
                row.f1,
                row.support
            );
        }
        if rows.len() > ROWS {
            let _ = write!(text, "\nThe first {ROWS} of {}.\n", rows.len());
        }
    }
    text += &usage(report);
    text += &training(report);
    let _ = write!(
        text,
        "\n## Limitations\n\n{ASKED}: where it fails, whom that may harm, what the training data lack.\n"
    );
    text
}

/// Labels whose rows are listed.
const ROWS: usize = 50;

/// What the hub reads. Nothing is said that is not known.
fn front_matter(report: &Report) -> String {
    let started = report.started.as_ref();
    let library = match () {
        () if adapter::is_in(&report.saved.dir) => "peft",
        () if report.is_sentence_transformer() => "sentence-transformers",
        () => "transformers",
    };
    let mut text = format!("---\nlibrary_name: {library}\n");
    if let Some(tag) = report.saved.task.pipeline_tag() {
        let _ = writeln!(text, "pipeline_tag: {tag}");
    }
    if let Some(base) = started.and_then(Started::model).filter(|base| is_hub_id(base)) {
        let _ = writeln!(text, "base_model: {}", quoted(base));
    }
    for (key, value) in started.and_then(Started::model).map(known_of_base).unwrap_or_default() {
        let _ = writeln!(text, "{key}: {}", quoted(&value));
    }
    text += "tags:\n- tk\n";
    if !report.graphs.is_empty() {
        text += "- onnx\n";
    }
    let trained: Vec<String> =
        started.map(|s| s.train().iter().map(|path| file_name(path)).collect()).unwrap_or_default();
    if !trained.is_empty() {
        text += "datasets:\n";
        trained.iter().for_each(|name| text += &format!("- {}\n", quoted(name)));
    }
    if let Some((metrics, on)) = report.metrics() {
        let known: Vec<(&String, f64)> = metrics
            .iter()
            .map(|(name, value)| (name, *value))
            .filter(|(_, value)| value.is_finite())
            .collect();
        if !known.is_empty() {
            text += "metrics:\n";
            let mut ids: Vec<&str> = known.iter().map(|(name, _)| hub_metric(name)).collect();
            ids.dedup();
            ids.iter().for_each(|id| text += &format!("- {}\n", quoted(id)));
            let name = quoted(&report.name);
            let task = report.saved.task.pipeline_tag().unwrap_or(report.saved.task.name());
            let on = quoted(if on.is_empty() { "evaluation data" } else { &on });
            let _ = write!(
                text,
                "model-index:\n- name: {name}\n  results:\n  - task:\n      type: {task}\n    dataset:\n      name: {on}\n      \
                 type: {on}\n    metrics:\n"
            );
            for (name, value) in known {
                let _ = write!(
                    text,
                    "    - type: {}\n      value: {value}\n      name: {}\n",
                    quoted(hub_metric(name)),
                    quoted(name)
                );
            }
        }
    }
    text + "---\n"
}

/// The hub's name of a metric.
fn hub_metric(name: &str) -> &str {
    match name {
        "f1_macro" | "f1_micro" => "f1",
        "pearson" => "pearsonr",
        "spearman" => "spearmanr",
        other => other,
    }
}

/// Whether a name is an id of the hub: an owner's and a model's.
fn is_hub_id(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() == 2 && parts.iter().all(|part| files::is_plain_name(part)) && !Path::new(name).exists()
}

/// License and language of the model that a run started from, where it is a directory with a card that says so.
fn known_of_base(base: &str) -> Vec<(&'static str, String)> {
    let Ok(Some(text)) = files::beginning(&Path::new(base).join("README.md")) else { return Vec::new() };
    let Some(front) = text.strip_prefix("---\n").and_then(|rest| Some(rest.split_once("\n---")?.0)) else {
        return Vec::new();
    };
    let value = |key: &'static str| {
        let line = front.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let value = line.trim().trim_matches(['"', '\'']);
        files::is_plain_name(value).then(|| (key, value.to_owned()))
    };
    ["license", "language"].into_iter().filter_map(value).collect()
}

fn usage(report: &Report) -> String {
    let python = match (report.is_sentence_transformer(), report.saved.task.pipeline_tag()) {
        (true, _) => {
            "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer(\"DIR\")\n\
                      print(model.encode([\"a text\"]))"
                .to_owned()
        }
        (false, Some(tag)) => {
            format!("from transformers import pipeline\n\nmodel = pipeline(\"{tag}\", model=\"DIR\")")
        }
        (false, None) => {
            let class = report.saved.config.architecture().filter(|class| files::is_plain_name(class));
            let class = class.unwrap_or("AutoModel");
            format!("from transformers import {class}\n\nmodel = {class}.from_pretrained(\"DIR\")")
        }
    };
    format!(
        "\n## How to use it\n\n`DIR` is this directory, or the model's id on the hub.\n\n```python\n{python}\n```\n\nOr without \
         Python:\n\n```sh\ntk export DIR\ntk serve DIR\n```\n"
    )
}

fn training(report: &Report) -> String {
    let Some(started) = &report.started else { return String::new() };
    let mut text = format!("\n## Training\n\n{} steps.", HumanCount(report.history.steps()));
    if let Some(best) = &report.best {
        let value = best.metrics.get(best.metric.name).copied().unwrap_or(f64::NAN);
        let _ = write!(
            text,
            " The best evaluation, by {}, was that of step {}: {value:.4}.",
            best.metric.name, best.step
        );
    }
    text += "\n\n| setting | value |\n| --- | --- |\n";
    for (name, value) in &started.table {
        let value = match (name.as_str(), value) {
            // where a file stood is nobody's business
            ("train" | "eval" | "model", toml::Value::String(path)) if !is_hub_id(path) => {
                file_name(Path::new(path))
            }
            ("train" | "eval", toml::Value::Array(paths)) => format!("{} files", paths.len()),
            (_, toml::Value::String(text)) => text.clone(),
            (_, other) => other.to_string(),
        };
        let _ = writeln!(text, "| {} | {} |", inline(name), inline(&value));
    }
    let _ = write!(text, "\nWhat the data are, who they are of, and how they were labelled: {ASKED}.\n");
    text
}

/// A text within a line of Markdown, where it is nothing else than a text.
fn inline(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => plain += "&amp;",
            '<' => plain += "&lt;",
            '>' => plain += "&gt;",
            '|' | '`' | '*' | '[' | ']' | '\\' | '#' => plain.extend(['\\', c]),
            c if c.is_control() => plain.push(' '),
            c => plain.push(c),
        }
    }
    plain
}

/// A string in YAML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            c if (c as u32) < 0x1_0000 => {
                let _ = write!(quoted, "\\u{:04x}", c as u32);
            }
            c => {
                let _ = write!(quoted, "\\U{:08x}", c as u32);
            }
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_yaml_hold_anything_and_markdown_nothing_but_text() {
        assert_eq!(quoted("a\"\\\n: é😀"), "\"a\\\"\\\\\\u000a: \\u00e9\\U0001f600\"");
        assert_eq!(inline("a|b\n<i> [x](y)"), "a\\|b &lt;i&gt; \\[x\\](y)");
    }

    #[test]
    fn only_an_owner_and_a_name_are_an_id_of_the_hub() {
        let found = ["google-bert/bert-base-uncased", "runs/../x", "/a/b", "a", "src/report"].map(is_hub_id);
        assert_eq!(found, [true, false, false, false, false]);
    }

    #[test]
    fn a_card_of_somebody_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = destination(dir.path(), false).unwrap();
        std::fs::write(&path, format!("---\n---\n{MARK}\n")).unwrap();
        destination(dir.path(), false).unwrap();
        std::fs::write(&path, "# my own").unwrap();
        let error = destination(dir.path(), false).unwrap_err();
        assert!(error.to_string().contains("--overwrite"), "{error}");
        destination(dir.path(), true).unwrap();
    }

    #[test]
    fn licence_and_language_are_taken_from_the_bases_card() {
        let dir = tempfile::tempdir().unwrap();
        let known = |text: &str| {
            std::fs::write(dir.path().join("README.md"), text).unwrap();
            known_of_base(&dir.path().display().to_string())
        };
        let text = "---\nlanguage: en\nlicense: \"apache-2.0\"\nlicense_name: x\n---\nlicense: no\n";
        assert_eq!(known(text), [("license", "apache-2.0".to_owned()), ("language", "en".to_owned())]);
        assert_eq!(known("---\nlicense: [a, b]\nlanguage:\n- en\n---\n"), []);
        assert_eq!(known("license: mit\n"), []);
    }
}
