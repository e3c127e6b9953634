//! Embeddings of sentences end to end: related texts in, sentence-transformers' files and rows of numbers out, by the real
//! binary.

mod common;

use std::path::{Path, PathBuf};

use common::{EMBEDDER, copy_dir, json, models, tk};
use serde_json::{Value, json};

const BASE: &str = "tiny-bert-single";

fn write(path: PathBuf, records: &[Value]) -> PathBuf {
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    std::fs::write(&path, lines).unwrap();
    path
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Words that belong together, for anchors, positives and negatives.
fn ranked(negatives: bool) -> Vec<Value> {
    let pairs = [
        ("movie", "film"),
        ("happy", "love"),
        ("sad", "hate"),
        ("sun", "day"),
        ("food", "price"),
        ("car", "home"),
        ("team", "game"),
        ("phone", "service"),
    ];
    let mut records = Vec::new();
    for (i, (a, b)) in pairs.iter().enumerate() {
        let mut record = json!({"anchor": format!("the {a}"), "positive": format!("a {b} and more")});
        if negatives {
            record["negative"] = json!(format!("a {} and more", pairs[(i + 3) % 8].1));
        }
        records.push(record);
    }
    records
}

fn scored() -> Vec<Value> {
    let pair = |a: &str, b: &str, score: f64| json!({"sentence1": a, "sentence2": b, "score": score});
    vec![
        pair("the movie was good", "the film was good", 5.0),
        pair("the movie was good", "the movie was great", 4.5),
        pair("who was at home", "rain in the morning", 0.5),
        pair("I love this", "I hate this", 1.0),
        pair("the food", "the price", 2.5),
        pair("a sad day", "a happy day", 1.5),
        pair("never", "always", 0.0),
        pair("we win", "they win", 3.0),
    ]
}

fn train(records: &Path, out: &Path, more: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = tk();
    command.args([
        "train",
        "--task",
        "embedding",
        "--max-length",
        "24",
        "--learning-rate",
        "3e-3",
        "--model",
    ]);
    if !more.contains(&"--model") {
        command.arg(models(BASE));
    }
    command.arg("--train").arg(records).arg("--eval").arg(records).arg("--output").arg(out);
    command.args(more.iter().filter(|arg| **arg != "--model")).assert()
}

fn measured(dir: &Path, records: &Path, runtime: &str, more: &[&str]) -> Value {
    let mut command = tk();
    command.arg("eval").arg(dir).args(["--json", "--runtime", runtime, "--input"]).arg(records).args(more);
    let found: Value = serde_json::from_slice(&command.assert().success().get_output().stdout).unwrap();
    found["metrics"].clone()
}

fn served(model: &Path, lines: &[Value], flags: &[&str]) -> Vec<Value> {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let assert =
        tk().arg("serve-batch").arg(model).args(["--input", "-"]).args(flags).write_stdin(input).assert();
    let said = text(&assert.success().get_output().stdout);
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn scored_pairs_are_learnt_and_the_files_are_those_of_sentence_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let (records, out) = (write(dir.path().join("pairs.jsonl"), &scored()), dir.path().join("out"));
    let more = ["--epochs", "30", "--max-score", "5", "--normalize", "--batch-size", "8"];
    let said = text(&train(&records, &out, &more).success().get_output().stderr);
    assert!(said.contains("pairs with a score; pooled by Mean, of length 1"), "{said}");
    let modules = json(out.join("modules.json"));
    let classes: Vec<&str> =
        modules.as_array().unwrap().iter().map(|m| m["type"].as_str().unwrap()).collect();
    assert!(classes[0].ends_with(".Transformer") && classes[1].ends_with(".Pooling"), "{classes:?}");
    assert!(classes[2].ends_with(".Normalize"), "{classes:?}");
    assert_eq!(json(out.join("1_Pooling/config.json"))["pooling_mode_mean_tokens"], true);
    assert_eq!(json(out.join("sentence_bert_config.json"))["max_seq_length"], 24);
    let config = json(out.join("config.json"));
    assert!(config["architectures"][0] == "BertModel" && config["id2label"].is_null(), "{config}");

    tk().arg("export").arg(&out).assert().success();
    let scores = ["--max-score", "5"];
    let (eager, onnx) =
        (measured(&out, &records, "eager", &scores), measured(&out, &records, "onnx", &scores));
    assert!(eager["spearman"].as_f64().unwrap() > 0.9, "{eager}");
    for metric in ["spearman", "loss"] {
        let of = |measured: &Value| measured[metric].as_f64().unwrap();
        assert!((of(&eager) - of(&onnx)).abs() < 1e-4, "{metric}: {eager} {onnx}");
    }
    let parity = tk().arg("parity").arg(&out).arg("--json").assert().success();
    let parity: Value = serde_json::from_slice(&parity.get_output().stdout).unwrap();
    let outputs = parity["runtimes"][0]["outputs"].as_object().unwrap();
    assert_eq!(outputs.keys().collect::<Vec<_>>(), ["last_hidden_state", "sentence_embedding"]);

    let lines = [
        json!({"text": "the movie was good", "id": 1}),
        json!({"text": "the movie was good", "text_pair": "the film was good"}),
        json!({"text": "the movie was good", "text_pair": "never"}),
        json!({"text": 3}),
    ];
    let answers = served(&out, &lines, &[]);
    let whole = numbers(&answers[0]["embedding"]);
    let length: f32 = whole.iter().map(|x| x * x).sum();
    assert!(whole.len() == 32 && (length - 1.0).abs() < 1e-5, "{length}");
    let like = |i: usize| answers[i]["similarity"].as_f64().unwrap();
    assert!(like(1) > 0.5 && like(1) > like(2), "{answers:?}");
    assert!(answers[3]["error"].as_str().unwrap().contains("text"));
    let short = numbers(&served(&out, &lines[..1], &["--dimensions", "8"])[0]["embedding"]);
    let norm: f32 = whole[..8].iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!(short.len() == 8 && short.iter().zip(&whole).all(|(a, b)| (a - b / norm).abs() < 1e-5));

    // a classifier that starts from it has none of its files
    let labelled = write(
        dir.path().join("labelled.jsonl"),
        &[json!({"text": "good", "label": "a"}), json!({"text": "bad", "label": "b"})],
    );
    let mut command = tk();
    command.args([
        "train",
        "--task",
        "text-classification",
        "--max-steps",
        "1",
        "--max-length",
        "24",
        "--model",
    ]);
    command.arg(&out).arg("--train").arg(labelled).arg("--output").arg(dir.path().join("classifier"));
    command.assert().success();
    for name in
        ["modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"]
    {
        assert!(!dir.path().join("classifier").join(name).exists(), "{name}");
    }
}

#[test]
fn what_belongs_to_a_text_is_found_among_all_others() {
    for (negatives, more) in [(false, &[][..]), (true, &["--matryoshka-dims", "32,8"][..])] {
        let dir = tempfile::tempdir().unwrap();
        let (records, out) =
            (write(dir.path().join("ranked.jsonl"), &ranked(negatives)), dir.path().join("out"));
        let own = ["--epochs", "150", "--batch-size", "8", "--pooling", "cls", "--dropout", "0"];
        train(&records, &out, &[&own[..], more].concat()).success();
        assert_eq!(json(out.join("1_Pooling/config.json"))["pooling_mode_cls_token"], true);
        let found = measured(&out, &records, "eager", &[]);
        assert!(found["recall@1"].as_f64().unwrap() > 0.9 && found["mrr"].as_f64().unwrap() > 0.9, "{found}");
        assert!(found["recall@10"].as_f64().unwrap() >= found["recall@1"].as_f64().unwrap());
    }
}

/// The loss is over the whole batch, whatever is held at a time.
#[test]
fn a_batch_in_chunks_learns_what_the_whole_batch_does() {
    let dir = tempfile::tempdir().unwrap();
    let records = write(dir.path().join("ranked.jsonl"), &ranked(true));
    let log = |name: &str, more: &[&str]| -> Vec<f64> {
        let out = dir.path().join(name);
        let own = ["--max-steps", "6", "--batch-size", "8", "--dropout", "0"];
        train(&records, &out, &[&own[..], more].concat()).success();
        let log = std::fs::read_to_string(out.join("training/log.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter_map(|line| line["loss"].as_f64()).collect()
    };
    let (whole, chunks, alone) =
        (log("whole", &[]), log("chunks", &["--cached-chunk", "3"]), log("alone", &["--cached-chunk", "1"]));
    assert_eq!(whole.len(), 6);
    for (i, whole) in whole.iter().enumerate() {
        assert!((whole - chunks[i]).abs() < 1e-5 * whole, "step {i}: {whole} {}", chunks[i]);
        assert!((whole - alone[i]).abs() < 1e-5 * whole, "step {i}: {whole} {}", alone[i]);
    }
    assert!(whole[5] < whole[1]);
}

#[test]
fn pooling_and_prompts_are_read_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("model");
    copy_dir(&models(BASE), &own);
    let put = |name: &str, value: Value| {
        let path = own.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, value.to_string()).unwrap();
    };
    let module = |path: &str, class: &str| json!({"idx": 0, "name": "0", "path": path, "type": class});
    let modules = |normalized: bool| {
        let mut list = vec![
            module("", "sentence_transformers.models.Transformer"),
            module("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
        ];
        if normalized {
            list.push(module("2_Normalize", "sentence_transformers.models.Normalize"));
        }
        Value::Array(list)
    };
    let mut config = json(own.join("config.json"));
    config["architectures"] = json!(["BertModel"]);
    put("config.json", config);
    put(
        "config_sentence_transformers.json",
        json!({"prompts": {"query": "the movie: "}, "default_prompt_name": null}),
    );
    put("sentence_bert_config.json", json!({"max_seq_length": 12, "do_lower_case": false}));
    let embedding = |pooling: Value, normalized: bool, flags: &[&str], record: Value| -> Vec<f32> {
        put("modules.json", modules(normalized));
        put("1_Pooling/config.json", pooling);
        tk().args(["export", "--quiet"]).arg(&own).assert().success();
        numbers(&served(&own, &[record], flags)[0]["embedding"])
    };
    let record = || json!({"text": "the plot was good"});
    let old = embedding(
        json!({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}),
        false,
        &[],
        record(),
    );
    let new = embedding(json!({"embedding_dimension": 32, "pooling_mode": "mean"}), false, &[], record());
    assert_eq!(old, new);
    let cls = embedding(
        json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}),
        false,
        &[],
        record(),
    );
    let max = embedding(json!({"pooling_mode": "max"}), false, &[], record());
    assert!(old != cls && max.iter().zip(&old).all(|(max, mean)| max >= mean));
    let unit = embedding(json!({"pooling_mode": "mean"}), true, &[], record());
    let norm: f32 = old.iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!(unit.iter().zip(&old).all(|(unit, own)| (unit - own / norm).abs() < 1e-5));
    let mean = || json!({"pooling_mode": "mean"});
    let prompted = embedding(mean(), false, &["--prompt-name", "query"], record());
    let written = embedding(mean(), false, &[], json!({"text": "the movie: the plot was good"}));
    assert!(prompted == written && prompted != old);

    // the graph pools, so it goes with the files
    put("1_Pooling/config.json", json!({"pooling_mode": "max"}));
    let stale = tk().arg("serve-batch").arg(&own).args(["--input", "-"]).write_stdin("").assert().code(2);
    assert!(text(&stale.get_output().stderr).contains("another definition"));
    put("1_Pooling/config.json", mean());

    let refused = |name: &str, value: Value, said: &str| {
        let before = std::fs::read(own.join(name)).unwrap();
        put(name, value);
        let output = tk().arg("export").arg(&own).assert().code(2);
        let text = text(&output.get_output().stderr);
        assert!(text.contains(said) && text.contains(name), "{said}: {text}");
        std::fs::write(own.join(name), before).unwrap();
    };
    let dense = module("2_Dense", "sentence_transformers.models.Dense");
    let mut with_dense = modules(false).as_array().unwrap().clone();
    with_dense.push(dense);
    refused("modules.json", Value::Array(with_dense), "Transformer, Pooling, Dense");
    refused("modules.json", json!({"a": 1}), "expected a list of modules");
    refused(
        "modules.json",
        json!([module("", "x.Transformer"), module("../x", "x.Pooling")]),
        "leads out of",
    );
    refused("1_Pooling/config.json", json!({"word_embedding_dimension": 33}), "33");
    refused("1_Pooling/config.json", json!({"pooling_mode": "median"}), "median");
    refused("1_Pooling/config.json", json!({"pooling_mode": ["mean", "cls"]}), "2 ways of pooling");
    refused("sentence_bert_config.json", json!({"max_seq_length": 1}), "max_seq_length is 1");
    refused(
        "config_sentence_transformers.json",
        json!({"prompts": {}, "default_prompt_name": "x"}),
        "no prompt \"x\"",
    );
}

#[test]
fn what_can_not_be_learnt_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |records: &[Value], more: &[&str], said: &str| {
        let path = write(dir.path().join("records.jsonl"), records);
        let assert = train(&path, &dir.path().join("out"), more).code(2);
        let text = text(&assert.get_output().stderr);
        assert!(text.contains(said), "{said}: {text}");
    };
    let pair = || scored().remove(0);
    refused(&[pair(), json!({"sentence1": "a", "sentence2": "b", "score": "x"})], &[], "records.jsonl:2");
    refused(&[pair(), json!({"sentence1": "a", "sentence2": "b"})], &[], "score");
    refused(&[pair(), ranked(false).remove(0)], &[], "records.jsonl:2");
    refused(&scored(), &["--embedding-loss", "cosine"], "a cosine is from -1 to 1");
    refused(&scored(), &["--temperature", "0.1"], "--temperature is for anchors");
    refused(&ranked(false), &["--embedding-loss", "cosine"], "--embedding-loss is for pairs");
    refused(&ranked(false), &["--matryoshka-dims", "64"], "--matryoshka-dims 64");
    refused(&ranked(false), &["--temperature", "0"], "--temperature 0");
    refused(&ranked(false), &["--prompt-name", "query"], "no prompt \"query\"");
    refused(&[json!({"anchor": "a"})], &[], "positive");
}

#[test]
fn embeddings_are_written_as_a_matrix() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("model");
    copy_dir(&models(EMBEDDER), &own);
    tk().args(["export", "--quiet"]).arg(&own).assert().success();
    let texts = ["the movie", "a sad day", "", "rain in the morning", "who was at home"];
    let records: Vec<Value> = texts.iter().map(|text| json!({"text": text})).collect();
    let bad = json!({"text": 3});
    let input = write(dir.path().join("texts.jsonl"), &[&records[..], &[bad]].concat());
    let serve = |output: &Path, more: &[&str]| {
        let mut command = tk();
        command.arg("serve-batch").arg(&own).args(["--window", "2", "--input"]).arg(&input).arg("--output");
        command.arg(output).args(more).assert()
    };

    let lines = dir.path().join("answers.jsonl");
    serve(&lines, &[]).success();
    let lines = std::fs::read_to_string(lines).unwrap();
    let answers: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for name in ["matrix.npy", "matrix.parquet"] {
        let output = dir.path().join(name);
        let said = text(&serve(&output, &[]).success().get_output().stderr);
        let whole = std::fs::read(&output).unwrap();
        if name.ends_with("npy") {
            assert!(said.contains("matrix.npy: 1 rows are NaN"), "{said}");
            let begin = 10 + usize::from(u16::from_le_bytes([whole[8], whole[9]]));
            let found: Vec<f32> =
                whole[begin..].chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
            assert_eq!(found.len(), 6 * 32);
            for (row, answer) in found.chunks(32).zip(&answers) {
                match answer.get("embedding") {
                    Some(embedding) => assert_eq!(row, numbers(embedding)),
                    None => assert!(row.iter().all(|x| x.is_nan()), "{answer}"),
                }
            }
        }
        serve(&output, &["--strict"]).code(2);
        assert_eq!(std::fs::read(&output).unwrap(), whole, "a refusal leaves what stood there");
    }
    let left = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("partial")));

    let refused = |output: &str, lines: &str, said: &str| {
        let output = dir.path().join(output);
        let mut command = tk();
        command.arg("serve-batch").arg(&own).args(["--input", "-", "--output"]).arg(output);
        let text = text(&command.write_stdin(lines.to_owned()).assert().code(2).get_output().stderr);
        assert!(text.contains(said), "{said}: {text}");
    };
    let pair = json!({"text": "a", "text_pair": "b", "id": "x"});
    refused("pairs.npy", &format!("{pair}\n"), "record of id \"x\": a matrix has a row for a text");
    assert!(!dir.path().join("pairs.npy").exists() && !dir.path().join("pairs.npy.partial").exists());
    let mut command = tk();
    command.arg("serve-batch").arg(models(BASE)).args(["--input", "-", "--output", "labels.parquet"]);
    let said = text(&command.write_stdin("{}").assert().code(2).get_output().stderr);
    assert!(said.contains("a matrix holds embeddings"), "{said}");
}

/// All families give hidden states; a causal one's last token has seen all.
#[test]
fn the_runtimes_agree_on_every_familys_embeddings() {
    let bases = common::CLASSIFIERS.into_iter().filter(|name| name.ends_with("-single"));
    for (i, base) in bases.enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("model");
        copy_dir(&models(base), &own);
        let module = |path: &str, class: &str| json!({"path": path, "type": format!("sentence_transformers.models.{class}")});
        let modules = json!([
            module("", "Transformer"),
            module("1_Pooling", "Pooling"),
            module("2_Normalize", "Normalize")
        ]);
        std::fs::write(own.join("modules.json"), modules.to_string()).unwrap();
        std::fs::create_dir(own.join("1_Pooling")).unwrap();
        let modes = ["mean", "max", "cls", "weightedmean", "mean_sqrt_len_tokens"];
        let mode = if base.contains("gpt2") { "lasttoken" } else { modes[i % modes.len()] };
        std::fs::write(own.join("1_Pooling/config.json"), json!({"pooling_mode": mode}).to_string()).unwrap();
        let parity = tk().arg("parity").arg(&own).arg("--json").assert().success();
        let parity: Value = serde_json::from_slice(&parity.get_output().stdout).unwrap();
        for runtime in parity["runtimes"].as_array().unwrap() {
            let output = &runtime["outputs"]["sentence_embedding"];
            assert!(output["max_abs"].as_f64().unwrap() < 1e-5, "{base}, {mode}: {runtime}");
        }
    }
}
