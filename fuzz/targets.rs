//! What tk reads of others: each target takes a folder in which one file may hold any bytes, and must come back. An error
//! is as good as a result; a panic, a hang or memory without end is a fault. `tests/fuzz.rs` makes the bytes.

use std::path::Path;

use serde_json::Map;
use tk::checkpoint::Weights;
use tk::data::records::{self, Columns, Files, How, Source};
use tk::data::tokens::Tokenizer;
use tk::generate::GenerationConfig;
use tk::model::ModelConfig;
use tk::predict::chunks::Chunks;
use tk::server::completions::Completions;
use tk::server::inference::Inference;
use tk::server::routes::{Asks, Route};
use tk::server::signature::Signature;
use tk::server::tokens;
use tk::task::{Start, Task};

/// A file of any bytes, and what reads it in its folder.
pub struct Target {
    pub file: &'static str,
    /// Files under `models/`: what the bytes begin as, and what stands beside them.
    pub seeds: &'static [&'static str],
    pub beside: &'static [&'static str],
    pub read: fn(&Path),
}

/// A small model to learn with.
const TINY: &[&str] = &[
    "tiny-bert-single/config.json",
    "tiny-bert-single/tokenizer.json",
    "tiny-bert-single/tokenizer_config.json",
];

pub const TARGETS: [Target; 17] = [
    Target { file: "records.jsonl", seeds: &[], beside: &[], read: |dir| rows(&dir.join("records.jsonl")) },
    Target { file: "records.json", seeds: &[], beside: &[], read: |dir| rows(&dir.join("records.json")) },
    Target { file: "records.csv", seeds: &[], beside: &[], read: |dir| rows(&dir.join("records.csv")) },
    Target { file: "records.tsv", seeds: &[], beside: &[], read: |dir| rows(&dir.join("records.tsv")) },
    Target { file: "records.txt", seeds: &[], beside: &[], read: |dir| rows(&dir.join("records.txt")) },
    Target {
        file: "records.jsonl.gz",
        seeds: &[],
        beside: &[],
        read: |dir| rows(&dir.join("records.jsonl.gz")),
    },
    Target {
        file: "records.csv.zst",
        seeds: &[],
        beside: &[],
        read: |dir| rows(&dir.join("records.csv.zst")),
    },
    Target {
        file: "records.parquet",
        seeds: &[],
        beside: &[],
        read: |dir| rows(&dir.join("records.parquet")),
    },
    Target {
        file: "sentences.conll",
        seeds: &[],
        beside: TINY,
        read: |dir| examples(dir, "token-classification", "sentences.conll"),
    },
    Target {
        file: "questions.json",
        seeds: &[],
        beside: TINY,
        read: |dir| examples(dir, "question-answering", "questions.json"),
    },
    Target { file: "body.json", seeds: &[], beside: TINY, read: body },
    Target { file: "requests.jsonl", seeds: &[], beside: &["tiny-gpt2-lm/tokenizer.json"], read: requests },
    Target {
        file: "model.safetensors",
        seeds: &["tiny-bert-single/weights_after_steps.safetensors"],
        beside: &["tiny-bert-single/config.json"],
        read: weights,
    },
    Target {
        file: "config.json",
        seeds: &[
            "tiny-bert-single/config.json",
            "tiny-bert-regression/config.json",
            "tiny-gpt2-lm/config.json",
            "tiny-distilbert-single/config.json",
            "tiny-electra-single/config.json",
            "tiny-deberta-v2-single/config.json",
            "tiny-mpnet-single/config.json",
            "tiny-modernbert-single/config.json",
            "tiny-roberta-single/config.json",
        ],
        beside: &[],
        read: config,
    },
    Target {
        file: "tokenizer.json",
        seeds: &["tiny-bert-single/tokenizer.json", "tiny-gpt2-lm/tokenizer.json"],
        beside: &["tiny-bert-single/tokenizer_config.json"],
        read: tokenizer,
    },
    Target {
        file: "vocab.txt",
        seeds: &["tiny-bert-single/vocab.txt"],
        beside: &["tiny-bert-single/tokenizer_config.json"],
        read: tokenizer,
    },
    Target {
        file: "merges.txt",
        seeds: &["tiny-gpt2-lm/merges.txt"],
        beside: &["tiny-gpt2-lm/vocab.json", "tiny-gpt2-lm/tokenizer_config.json"],
        read: tokenizer,
    },
];

/// Every record of a file, with its texts and a label.
fn rows(path: &Path) {
    let Ok(rows) = records::read(&Source::Path(path.into()), &How::default()) else { return };
    let columns = Columns::default();
    let (mut read, mut whole) = (0, true);
    for row in rows {
        whole &= row.is_ok();
        read += 1;
        let Ok(Ok(mut row)) = row else { continue };
        let _ =
            (row.text(&columns, "text").map(str::len), row.optional_text(&columns, "text_pair").map(|_| ()));
        row.fields.values().for_each(|value| drop(records::describe(value)));
        row.take(&columns, "id");
    }
    let counted = records::count(path, &How::default());
    assert!(!whole || counted.unwrap() == read, "records that were counted and not read");
}

/// Every record of a file as the examples of a task.
fn examples(dir: &Path, task: &str, file: &str) {
    let Ok(config) = ModelConfig::read(dir) else { return };
    let (records, training, say) = Default::default();
    let (train, max_length) = (&Files::from(&dir.join(file)), 24);
    let (records, training, say) = (&records, &training, &say);
    let mut start = Start {
        model: dir,
        config,
        from_scratch: false,
        train,
        records,
        training,
        max_length,
        cache: None,
        say,
    };
    let Ok(learning) = Task::learn(task, &mut start) else { return };
    for example in learning.examples {
        let length = example.encoding.len();
        assert!(length <= max_length, "{length} tokens where {max_length} were allowed");
    }
}

/// A body that a client sends to `tk serve`, on every route.
fn body(dir: &Path) {
    let Ok(body) = std::fs::read(dir.join("body.json")) else { return };
    for (route, _) in Route::ALL {
        let Ok(Asks { records, form, .. }) = route.read(&body) else { continue };
        assert!(!records.is_empty());
        // answers of another kind than the route's
        let answers = records.iter().map(|_| Map::from_iter([("score".to_owned(), 0.5.into())])).collect();
        let _ = form.body(answers, "model", 1);
    }
    // all of it JSON, and what stands behind the last brace binary data
    let behind = body.iter().rposition(|&byte| byte == b'}').map(|at| at + 1);
    for length in [None, behind] {
        let Ok(inference) = Inference::read(&body, length) else { continue };
        let names = inference.inputs.iter().map(|input| input.name.clone()).collect();
        let signature =
            Signature { inputs: names, outputs: Vec::new(), vocabulary: 100, token_types: 2, max_length: 8 };
        let Ok(rows) = signature.rows(inference.inputs) else { continue };
        assert!(rows.sequences.iter().all(|row| (1..=8).contains(&row.len())));
    }
    let _ = Completions::read(&body);
    if let Ok(tokenizer) = Tokenizer::open(dir) {
        let _ = (tokens::tokenize(&tokenizer, &body), tokens::decode(&tokenizer, &body));
    }
}

/// Lines for serve-batch: an id, a prompt and how to go on with it.
fn requests(dir: &Path) {
    let Ok(tokenizer) = Tokenizer::open(dir) else { return };
    let source = Source::Path(dir.join("requests.jsonl"));
    let Ok(rows) = records::read(&source, &How::default()) else { return };
    let columns = Columns::default();
    let windows = Chunks {
        rows,
        source: source.to_string(),
        columns: columns.clone(),
        make: Box::new(move |row| {
            let settings =
                GenerationConfig::default().with(&row.fields).map_err(|e| row.bad(e.to_string()))?;
            let text = row.text(&columns, "prompt")?;
            let ids = tokenizer.encode(text, None, usize::MAX).map_err(|e| row.bad(e.to_string()))?;
            Ok((settings, ids))
        }),
        size: 4,
        strict: false,
        read: 0,
        until: None,
    };
    for window in windows {
        let Ok(window) = window else { return };
        window.entries.iter().for_each(|entry| drop((entry.key.answer(&Map::new()), entry.item.is_ok())));
    }
}

fn weights(dir: &Path) {
    let Ok(config) = ModelConfig::read(dir) else { return };
    let Ok(weights) = Weights::open(dir, config.family.names()) else { return };
    let names: Vec<&str> = weights.names().collect();
    names.iter().for_each(|name| drop((weights.shape(name), weights.f32(name).map(|values| values.len()))));
}

fn config(dir: &Path) {
    let Ok(config) = ModelConfig::read(dir) else { return };
    let _ = (config.max_positions(), config.vocab_size(), config.token_types(), config.initializer_range());
    let Ok(task) = Task::from_config(&config) else { return };
    let _ = task.params(&config.family).map(|params| params.len());
}

fn tokenizer(dir: &Path) {
    let Ok(mut tokenizer) = Tokenizer::open(dir) else { return };
    let _ = (tokenizer.check_fits(512, Some(2)), tokenizer.pad_id());
    for text in ["", "a plain text, of no kind", "Ça va 中文 😀 \u{0} \u{202e}[SEP] <|endoftext|>"] {
        for (pair, longest) in [(None, 2), (None, 64), (Some("and another"), 5), (Some(""), usize::MAX)] {
            let Ok(encoding) = tokenizer.encode(text, pair, longest) else { continue };
            assert!(encoding.len() <= longest, "{} tokens where {longest} were allowed", encoding.len());
        }
    }
}
