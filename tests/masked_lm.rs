//! Masked words, next sentences and both at once, end to end: documents in, fills and relations out, by the real binary.

mod common;

use std::path::{Path, PathBuf};

use common::{FOLLOWER, MASKERS, PRE_TRAINED, copy_dir, models, tk};
use serde_json::{Value, json};

/// Documents that are easy to learn: in one, every sentence is about one thing.
fn documents() -> Vec<Value> {
    let things = ["movie", "food", "phone", "car", "rain", "game", "home", "team"];
    let sentence = |thing: &str, i: usize| match i % 3 {
        0 => format!("The {thing} was good and the {thing} was great."),
        1 => format!("We love the {thing} because the {thing} is not bad."),
        _ => format!("Who was at the {thing} today?"),
    };
    let text = |thing: &str| (0..6).map(|i| sentence(thing, i)).collect::<Vec<_>>().join(" ");
    things.iter().map(|thing| json!({"text": text(thing)})).collect()
}

fn write(dir: &Path, records: &[Value]) -> PathBuf {
    let path = dir.join("documents.jsonl");
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    std::fs::write(&path, lines).unwrap();
    path
}

fn stdout(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

/// `tk train` on a file that is also measured on.
fn train(task: &str, model: &Path, records: &Path, out: &Path, more: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = tk();
    command.args([
        "train",
        "--task",
        task,
        "--batch-size",
        "8",
        "--max-length",
        "40",
        "--learning-rate",
        "3e-3",
    ]);
    command
        .arg("--model")
        .arg(model)
        .arg("--train")
        .arg(records)
        .arg("--eval")
        .arg(records)
        .arg("--output")
        .arg(out);
    command.args(more).assert()
}

fn measured(dir: &Path, records: &Path, runtime: &str) -> Value {
    let mut command = tk();
    command.arg("eval").arg(dir).args(["--json", "--runtime", runtime, "--input"]).arg(records);
    let found: Value = serde_json::from_str(&stdout(&command.assert().success())).unwrap();
    found["metrics"].clone()
}

fn served(model: &Path, lines: &[Value], flags: &[&str]) -> Vec<Value> {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let assert =
        tk().arg("serve-batch").arg(model).args(["--input", "-"]).args(flags).write_stdin(input).assert();
    stdout(&assert.success()).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Holds the metrics of both runtimes against each other.
fn same(dir: &Path, records: &Path, metrics: &[&str]) -> Value {
    tk().arg("export").arg(dir).assert().success();
    let (eager, onnx) = (measured(dir, records, "eager"), measured(dir, records, "onnx"));
    for metric in metrics {
        let of =
            |measured: &Value| measured[metric].as_f64().unwrap_or_else(|| panic!("{metric}: {measured}"));
        assert!((of(&eager) - of(&onnx)).abs() < 1e-4, "{metric}: {eager} {onnx}");
    }
    tk().arg("parity").arg(dir).assert().success();
    eager
}

#[test]
fn every_family_adapts_to_its_texts_and_fills_masks() {
    for model in MASKERS {
        let dir = tempfile::tempdir().unwrap();
        let (records, out) = (write(dir.path(), &documents()[..3]), dir.path().join("out"));
        let before = measured(&models(model), &records, "eager")["loss"].as_f64().unwrap();
        train("masked-lm", &models(model), &records, &out, &["--epochs", "25"]).success();
        let after = same(&out, &records, &["loss", "perplexity", "accuracy"]);
        let loss = after["loss"].as_f64().unwrap();
        assert!(loss < 0.85 * before, "{model}: {before} {after}");
        assert!((after["perplexity"].as_f64().unwrap().ln() - loss).abs() < 1e-9);
        let config = common::json(out.join("config.json"));
        assert!(
            config["id2label"].is_null()
                && config["architectures"][0].as_str().unwrap().ends_with("ForMaskedLM")
        );
    }
}

#[test]
fn as_many_fills_as_are_asked_for_stand_for_every_mask() {
    for (model, mask) in [(MASKERS[0], "[MASK]"), (MASKERS[2], "<mask>")] {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("model");
        copy_dir(&models(model), &copy);
        tk().arg("export").arg(&copy).assert().success();
        let lines = [
            json!({"text": format!("the {mask} was very {mask} !"), "id": "a"}),
            json!({"text": mask}),
            json!({"text": "nothing is hidden"}),
            json!({"text": format!("{} {mask}", "word ".repeat(90))}),
            json!({"text": format!("{mask} {}", "word ".repeat(90))}),
        ];
        let answers = served(&copy, &lines, &["--top-k", "3"]);
        assert_eq!((&answers[0]["id"], answers[0]["fills"].as_array().unwrap().len()), (&json!("a"), 2));
        for fills in answers[0]["fills"].as_array().unwrap() {
            let scores: Vec<f64> =
                fills.as_array().unwrap().iter().map(|fill| fill["score"].as_f64().unwrap()).collect();
            assert!(scores.len() == 3 && scores.is_sorted_by(|a, b| a >= b) && scores[0] < 1.0, "{fills}");
            assert!(fills[0]["token"].is_string());
        }
        assert!(answers[2]["error"].as_str().unwrap().contains(&format!("no {mask}")), "{}", answers[2]);
        assert!(answers[3]["error"].as_str().unwrap().contains("1 of the text's masks stand outside"));
        assert_eq!(answers[4]["truncated"], true);
        assert_eq!(served(&copy, &lines[1..2], &[])[0]["fills"][0].as_array().unwrap().len(), 5);
        let all: f64 = served(&copy, &lines[1..2], &["--top-k", "100000"])[0]["fills"][0]
            .as_array()
            .unwrap()
            .iter()
            .map(|fill| fill["score"].as_f64().unwrap())
            .sum();
        assert!((all - 1.0).abs() < 1e-5, "{all}");
    }
}

#[test]
fn whether_a_text_follows_is_told_of_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let (records, out) = (write(dir.path(), &documents()), dir.path().join("out"));
    train("next-sentence", &models(FOLLOWER), &records, &out, &["--epochs", "60"]).success();
    let found = same(&out, &records, &["accuracy", "loss"]);
    assert!(found["accuracy"].as_f64().unwrap() > 0.8, "{found}");
    let lines = [
        json!({"text": "The movie was good.", "text_pair": "We love the movie."}),
        json!({"text": "The movie was good."}),
        json!({"text": "The movie was good.", "text_pair": ""}),
    ];
    let answers = served(&out, &lines, &[]);
    let scores = &answers[0]["scores"];
    let sum = scores["IsNext"].as_f64().unwrap() + scores["NotNext"].as_f64().unwrap();
    assert!((sum - 1.0).abs() < 1e-6 && answers[0]["score"] == scores[answers[0]["label"].as_str().unwrap()]);
    assert!(answers[1]["error"].as_str().unwrap().contains("text_pair"), "{}", answers[1]);
    assert!(answers[2]["error"].as_str().unwrap().contains("second text is empty"), "{}", answers[2]);
}

#[test]
fn bert_is_pre_trained_from_nothing_with_a_vocabulary_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (records, out, base) =
        (write(dir.path(), &documents()), dir.path().join("out"), dir.path().join("base"));
    std::fs::create_dir(&base).unwrap();
    let mut config = common::json(models(PRE_TRAINED).join("config.json"));
    config["vocab_size"] = json!(120);
    config["initializer_range"] = json!(0.1);
    std::fs::write(base.join("config.json"), config.to_string()).unwrap();
    let more = ["--from-scratch", "--epochs", "100", "--learning-rate", "1e-2", "--whole-words"];
    let said = stderr(&train("masked-lm,next-sentence", &base, &records, &out, &more).success());
    assert!(said.contains("trained a tokenizer of") && said.contains("masked_lm_loss"), "{said}");
    let found =
        same(&out, &records, &["loss", "masked_lm_loss", "next_sentence_loss", "next_sentence_accuracy"]);
    assert_eq!(found["masked_lm"]["loss"], found["masked_lm_loss"]);
    assert!(found["masked_lm"]["perplexity"].is_number() && found["next_sentence"]["accuracy"].is_number());
    assert!(found["masked_lm"]["loss"].as_f64().unwrap() < 2.0, "{found}");
    let log = std::fs::read_to_string(out.join("training/log.jsonl")).unwrap();
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    let part = |name: &str| first[name].as_f64().unwrap();
    assert!((part("loss") - part("masked_lm_loss") - part("next_sentence_loss")).abs() < 1e-9, "{first}");

    let lines = [
        json!({"text": "the movie was [MASK]"}),
        json!({"text": "the movie was [MASK]", "text_pair": "who was at the movie"}),
        json!({"text": "the movie was good", "text_pair": "who was at the movie"}),
        json!({"text": "the movie was good"}),
    ];
    let answers = served(&out, &lines, &[]);
    let has = |i: usize| (answers[i]["fills"].is_array(), answers[i]["label"].is_string());
    assert_eq!([has(0), has(1), has(2)], [(true, false), (true, true), (false, true)]);
    assert!(answers[3]["error"].as_str().unwrap().contains("no mask"), "{}", answers[3]);

    // the body is what others start from
    let labelled = dir.path().join("labelled.jsonl");
    std::fs::write(
        &labelled,
        "{\"text\": \"good\", \"label\": \"a\"}\n{\"text\": \"bad\", \"label\": \"b\"}\n",
    )
    .unwrap();
    let tuned =
        train("text-classification", &out, &labelled, &dir.path().join("tuned"), &["--max-steps", "1"]);
    let said = stderr(&tuned.success());
    assert!(said.contains("classifier.weight, classifier.bias drawn anew"), "{said}");
}

#[test]
fn other_families_learn_vocabularies_of_their_own_too() {
    for (model, class, mask) in
        [(MASKERS[1], "BertTokenizer", "[MASK]"), (MASKERS[2], "RobertaTokenizer", "<mask>")]
    {
        let dir = tempfile::tempdir().unwrap();
        let (records, out, base) =
            (write(dir.path(), &documents()), dir.path().join("out"), dir.path().join("base"));
        std::fs::create_dir(&base).unwrap();
        let mut config = common::json(models(model).join("config.json"));
        config["vocab_size"] = json!(300);
        std::fs::write(base.join("config.json"), config.to_string()).unwrap();
        train("masked-lm", &base, &records, &out, &["--from-scratch", "--max-steps", "2"]).success();
        let says = common::json(out.join("tokenizer_config.json"));
        assert_eq!((&says["tokenizer_class"], &says["mask_token"]), (&json!(class), &json!(mask)), "{model}");
        tk().arg("export").arg(&out).assert().success();
        let answer = &served(&out, &[json!({"text": format!("the {mask} was")})], &[])[0];
        assert_eq!(answer["fills"][0].as_array().unwrap().len(), 5, "{model}: {answer}");
    }
}

#[test]
fn what_can_not_be_learnt_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let records = write(dir.path(), &documents());
    let refused = |task: &str, model: &str, records: &Path, more: &[&str], said: &str| {
        let assert = train(task, &models(model), records, &dir.path().join("out"), more).code(2);
        let text = stderr(&assert);
        assert!(text.contains(said), "{task}, {model}: {text}");
    };
    let no_head = "it has none for roberta";
    refused("next-sentence", MASKERS[2], &records, &[], no_head);
    refused("masked-lm,next-sentence", MASKERS[2], &records, &[], no_head);
    refused("masked-lm", "tiny-gpt2-lm", &records, &[], "no token for what is masked");
    refused("masked-lm", MASKERS[0], &records, &["--mask-probability", "0"], "--mask-probability is 0");
    refused("next-sentence", FOLLOWER, &records, &["--whole-words"], "--whole-words is for masked-lm");
    refused("masked-lm", MASKERS[0], &records, &["--text-unit", "file"], "--text-unit is for .txt files");
    let one = dir.path().join("one.txt");
    std::fs::write(&one, "A line.\nAnother line.\n").unwrap();
    refused("next-sentence", FOLLOWER, &one, &[], "1 documents with text, two at least");
    std::fs::write(&one, "\u{200b}").unwrap();
    refused("masked-lm", MASKERS[0], &one, &[], "one.txt");
}

/// A checkpoint of both heads answers for either, and an encoder gives embeddings, where `--task` says so.
#[test]
fn a_task_is_asked_for_where_a_checkpoint_has_several() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("model");
    copy_dir(&models(PRE_TRAINED), &own);
    let record = json!({"text": "The movie [MASK] good.", "text_pair": "We love it."});
    let serve = |task: &[&str]| {
        let mut command = tk();
        command.arg("serve-batch").arg(&own).args(["--input", "-"]).args(task);
        command.write_stdin(format!("{record}\n")).assert()
    };
    for (task, field) in [("masked-lm", "fills"), ("next-sentence", "scores"), ("embedding", "similarity")] {
        let asked = ["--task", task];
        tk().arg("export").arg(&own).args(asked).assert().success();
        let answer: Value = serde_json::from_str(&stdout(&serve(&asked).success())).unwrap();
        assert!(answer.get(field).is_some(), "{task}: {answer}");
        tk().arg("parity").arg(&own).args(asked).assert().success();
        let said = stderr(&serve(&[]).code(2));
        assert!(
            said.contains(&format!("was exported for {task}, not for masked-lm,next-sentence")),
            "{said}"
        );
        assert!(said.contains(&format!("give --task {task}")), "{said}");
    }
    let records = write(dir.path(), &documents());
    let measured =
        tk().arg("eval").arg(&own).args(["--task", "masked-lm", "--json", "--input"]).arg(&records).assert();
    let measured: Value = serde_json::from_str(&stdout(&measured.success())).unwrap();
    assert!(measured["metrics"]["perplexity"].is_number(), "{measured}");

    let said = stderr(&serve(&["--task", "text-classification"]).code(2));
    assert!(said.contains("lacks classifier.weight"), "{said}");
    let said = stderr(&serve(&["--task", "next-sentence"]).code(2));
    assert!(said.contains("was exported for embedding, not for next-sentence"), "{said}");
    assert!(said.contains(&format!("tk export {} --task next-sentence", own.display())), "{said}");
}
