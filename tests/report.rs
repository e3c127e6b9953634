//! `tk report`, the real binary on the tiny models: it tells what `tk eval` tells, shows what was wrong, lets no text of a
//! record become a part of the page, and leaves other people's files alone.

mod common;

use std::path::{Path, PathBuf};

use common::{copy, copy_dir, models, records_file, tk};
use serde_json::{Value, json};

/// What a text, a label or a name may try.
const HOSTILE: &str = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"' é😀";

/// A directory for a model, its records and its run.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Trains a tiny model on records for a few steps, with an evaluation every three.
    fn trained(task: &str, model: &str, records: &[Value], more: &[&str]) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(bench.path("records.jsonl"), lines).unwrap();
        let mut train = tk();
        train.args(["train", "--quiet", "--task", task, "--max-length", "48", "--max-steps", "6"]);
        train.args(["--eval-every", "3", "--batch-size", "4"]).arg("--model").arg(models(model));
        train.arg("--train").arg(bench.path("records.jsonl")).arg("--eval").arg(bench.path("records.jsonl"));
        train.arg("--output").arg(bench.path("run")).args(more).assert().success();
        bench
    }

    /// A report: what it tells, and the page.
    fn report(&self, more: &[&str]) -> (Value, String) {
        report(&self.path("run"), more)
    }
}

fn report(dir: &Path, more: &[&str]) -> (Value, String) {
    let done = tk().args(["report", "--json"]).arg(dir).args(more).assert().success();
    let told: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    let page = std::fs::read_to_string(told["report"].as_str().unwrap()).unwrap();
    assert!(page.starts_with("<!doctype html>\n<html lang=\"en\">") && page.contains("<title>"), "{page}");
    // all that is between < and >, and the styles: no text of a record has one of them
    let tags = page.split('<').skip(1).map(|part| part.split_once('>').expect("a tag ends").0);
    let style = &page[page.find("<style>").unwrap()..page.find("</style>").unwrap()];
    for tag in tags.chain([style]) {
        for other in ["script", "img ", "src=", "href=", "onerror", "url(", "@import", "http"] {
            assert!(!tag.contains(other), "the page does not stand on its own: {other} in <{tag}>");
        }
    }
    (told, page)
}

/// What `tk eval` tells of the same records.
fn evaluated(dir: &Path, records: &Path) -> Value {
    let done = tk().args(["eval", "--json"]).arg(dir).arg("--input").arg(records).assert().success();
    serde_json::from_slice::<Value>(&done.get_output().stdout).unwrap()["metrics"].clone()
}

fn refused(args: &[&str], dir: &Path, said: &str) {
    let done = tk().arg("report").arg(dir).args(args).assert().code(2);
    let text = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(text.contains(said), "{text}");
}

fn classified() -> Vec<Value> {
    let labels = [HOSTILE, "no", "yes"];
    (0..30)
        .map(|i| {
            let text = if i == 0 { HOSTILE.repeat(20) } else { format!("film {i} {HOSTILE}") };
            json!({"text": text, "label": labels[i % 3]})
        })
        .collect()
}

#[test]
fn a_classifiers_page_tells_what_eval_tells_and_no_text_becomes_a_part_of_it() {
    let bench = Bench::trained("text-classification", "tiny-bert-single", &classified(), &["--audit", "2"]);
    let (told, page) = bench.report(&[]);
    assert_eq!(told["metrics"], evaluated(&bench.path("run"), &bench.path("records.jsonl")));
    let counts = told["review"]["confusion"]["counts"].as_array().unwrap();
    let all: u64 = counts.iter().map(|cell| cell[2].as_u64().unwrap()).sum();
    let right: u64 =
        counts.iter().filter(|cell| cell[0] == cell[1]).map(|cell| cell[2].as_u64().unwrap()).sum();
    assert_eq!((all, told["metrics"]["accuracy"].as_f64()), (30, Some(right as f64 / 30.0)));
    assert_eq!(told["review"]["wrong"], 30 - right);
    let bins = told["review"]["calibration"]["bins"].as_array().unwrap();
    assert_eq!((bins.len(), bins.iter().map(|bin| bin["count"].as_u64().unwrap()).sum::<u64>()), (15, 30));
    let worst = told["review"]["worst"].as_array().unwrap();
    let losses: Vec<f64> = worst.iter().map(|wrong| wrong["loss"].as_f64().unwrap()).collect();
    assert!(!losses.is_empty() && losses.windows(2).all(|pair| pair[0] >= pair[1]), "{losses:?}");
    // a text as it stands in the file, by its line
    let at = worst[0]["line"].as_u64().unwrap() as usize - 1;
    assert_eq!(
        (&worst[0]["text"], &worst[0]["wanted"]),
        (&classified()[at]["text"], &classified()[at]["label"])
    );
    // macro F1 over the rows
    let rows = told["review"]["rows"].as_array().unwrap();
    let mean = rows.iter().map(|row| row["f1"].as_f64().unwrap()).sum::<f64>() / rows.len() as f64;
    assert!((mean - told["metrics"]["f1_macro"].as_f64().unwrap()).abs() < 1e-12);

    let escaped = "&lt;/td&gt;&lt;/table&gt;&lt;script&gt;alert(1)&lt;/script&gt;";
    assert!(page.matches(escaped).count() >= 3 + worst.len(), "labels and texts");
    for part in [
        "training loss",
        "learning rate",
        "norm of the gradient",
        "evaluation: accuracy",
        "not exported yet",
        "bert.embeddings.word_embeddings.weight", // of the audit
        "warmup-ratio",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!((&told["steps"], &told["audit"]["step"]), (&json!(6), &json!(6)));
    let drawings = page.matches("<svg").count();
    assert_eq!(drawings, page.matches("role=\"img\" aria-label=\"").count());
    assert!(drawings >= 8, "{drawings} drawings");
}

#[test]
fn what_the_run_measured_on_has_to_be_the_same_file() {
    let bench = Bench::trained("text-classification", "tiny-bert-single", &classified(), &[]);
    let records = bench.path("records.jsonl").display().to_string();
    let mut text = std::fs::read_to_string(&records).unwrap();
    text += "{\"text\": \"more\", \"label\": \"no\"}\n";
    std::fs::write(&records, text).unwrap();
    let (told, page) = bench.report(&[]);
    assert!(told["not_measured"].as_str().unwrap().contains("is not any more what"), "{told}");
    assert!(
        told.get("metrics").is_none()
            && page.contains("Nothing was measured")
            && page.contains("training loss")
    );
    // the run's best evaluation is told instead
    assert!(
        page.contains("Of the run&#39;s best evaluation") || page.contains("best evaluation, step"),
        "{page}"
    );
    let elsewhere = bench.path("page.html").display().to_string();
    let (told, _) = bench.report(&["--input", &records, "--output", &elsewhere]);
    assert_eq!((&told["examples"], &told["report"]), (&json!(31), &json!(elsewhere)));
    std::fs::remove_file(&records).unwrap();
    let (told, _) = bench.report(&[]);
    assert!(told["not_measured"].as_str().unwrap().contains("is not there"), "{told}");

    refused(&["--label-column", "x"], &bench.path("run"), "--input");
    refused(&["--output", "/no/such/folder/x.html"], &bench.path("run"), "is not there");
    refused(&[], &models("tiny-bert-single"), "give --input");
    let log = bench.path("run/training/log.jsonl");
    std::fs::write(&log, "{\"step\":1,\"loss\":null}\nnotes\n{}\n").unwrap();
    refused(&[], &bench.path("run"), "log.jsonl:2:");
    std::fs::write(&log, "{\"step\":1,\"loss\":null}\n{\"step\":2,\"loss\":0.5}\n{\"step\":3,").unwrap();
    assert!(bench.report(&[]).1.contains("1 of 2 are no numbers"));
}

#[test]
fn records_of_several_files_are_told_with_their_file() {
    let (_dir, path) = copy("tiny-bert-single");
    for name in ["one.jsonl", "two.jsonl"] {
        records_file("tiny-bert-single", 1, &path.join(name));
    }
    let input = ["one.jsonl", "two.jsonl"].map(|name| path.join(name).display().to_string());
    let (told, page) = report(&path, &["--input", &input[0], &input[1]]);
    let (one, _) = report(&path, &["--input", &input[0]]);
    assert_eq!(told["examples"].as_u64(), one["examples"].as_u64().map(|n| 2 * n));
    let worst = told["review"]["worst"].as_array().unwrap();
    assert!(worst[0]["file"] != worst[1]["file"] && worst[0]["line"] == worst[1]["line"], "{worst:?}");
    let place = format!(">two.jsonl:{}<", worst[0]["line"]);
    assert!(page.contains(&place) && one["review"]["worst"][0].get("file").is_none(), "{place}");
}

#[test]
fn a_page_can_go_to_standard_output_alone() {
    let (_dir, path) = copy("tiny-bert-single");
    let input = path.join("records.jsonl");
    records_file("tiny-bert-single", 1, &input);
    let input = input.display().to_string();
    let done = tk().arg("report").arg(&path).args(["--input", &input, "--output", "-"]).assert().success();
    let page = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"), "{page}");
    assert!(String::from_utf8_lossy(&done.get_output().stderr).contains("accuracy"));
    refused(&["--input", &input, "--output", "-", "--json"], &path, "--json");
    assert!(!path.join("report.html").exists());
}

#[test]
fn exported_graphs_are_told_with_their_verdict() {
    let bench = Bench::trained("text-classification", "tiny-bert-single", &classified(), &[]);
    tk().args(["export", "--quiet"]).arg(bench.path("run")).assert().success();
    let (told, page) = bench.report(&[]);
    assert_eq!(told["graphs"][0]["state"], "verified");
    assert!(page.contains("every exported graph was held against these weights"));
    let graph = bench.path("run/onnx/model.onnx");
    let mut bytes = std::fs::read(&graph).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&graph, bytes).unwrap();
    let (told, page) = bench.report(&[]);
    assert_eq!(told["graphs"][0]["state"], "changed");
    assert!(page.contains("not the file that was verified") && page.contains("1 of 1 graphs"));
}

#[test]
fn entities_have_a_row_a_type_as_eval_counts_them() {
    let (_dir, path) = copy("tiny-bert-tokens");
    let input = path.join("records.jsonl");
    records_file("tiny-bert-tokens", 1, &input);
    let (told, page) = report(&path, &["--input", &input.display().to_string()]);
    let wanted = evaluated(&path, &input);
    assert_eq!(told["metrics"], wanted);
    let rows = told["review"]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), wanted["per_type"].as_object().unwrap().len());
    for row in rows {
        let of_eval = &wanted["per_type"][row["label"].as_str().unwrap()];
        for name in ["precision", "recall", "support"] {
            assert_eq!(row[name], of_eval[name], "{row}");
        }
        assert!((row["f1"].as_f64().unwrap() - of_eval["f1"].as_f64().unwrap()).abs() < 1e-12, "{row}");
    }
    let worst = &told["review"]["worst"][0];
    assert!(worst["wanted"] != worst["found"] && page.contains("Worst errors"), "{worst}");
}

#[test]
fn every_task_has_a_page_that_tells_what_eval_tells() {
    let text =
        json!({"text": "I love New York City. The film was not bad at all! It rained. We stayed at home."});
    let related = json!({"anchor": "a good film", "positive": "the film was good"});
    for (model, own, shown) in [
        ("tiny-bert-multi", None, "Calibration"),
        ("tiny-bert-regression", None, "Predicted over wanted"),
        ("tiny-bert-answers", None, "Worst errors"),
        ("tiny-bert-masked", Some(&text), "masked-lm"),
        ("tiny-bert-pairs", Some(&text), "next-sentence"),
        ("tiny-bert-embedding", Some(&related), "embedding"),
        ("tiny-gpt2-lm", Some(&text), "causal-lm"),
    ] {
        let (_dir, path) = copy(model);
        let input = path.join("records.jsonl");
        match own {
            None => records_file(model, 1, &input),
            Some(record) => std::fs::write(&input, format!("{record}\n").repeat(3)).unwrap(),
        }
        let (told, page) = report(&path, &["--input", &input.display().to_string()]);
        assert_eq!(told["metrics"], evaluated(&path, &input), "{model}");
        assert!(page.contains(shown), "{model}: {shown}");
    }
}

#[test]
fn a_card_has_what_the_hub_reads_and_somebody_elses_readme_stays() {
    let bench = Bench::trained("text-classification", "tiny-bert-single", &classified(), &[]);
    let readme = bench.path("run/README.md");
    std::fs::write(&readme, "# my own").unwrap();
    refused(&["--card"], &bench.path("run"), "--overwrite");
    assert_eq!(std::fs::read_to_string(&readme).unwrap(), "# my own");
    assert!(!bench.path("run/report.html").exists(), "nothing was changed");
    let (told, _) = bench.report(&["--card", "--overwrite"]);
    assert_eq!(told["card"], json!(readme.display().to_string()));
    let card = std::fs::read_to_string(&readme).unwrap();
    for part in [
        "pipeline_tag: text-classification\n",
        "model-index:\n- name: \"run\"\n",
        "name: \"f1_macro\"\n",
        "[More information needed]",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
    assert!(!card.contains("<script") && !card.contains("base_model") && !card.contains("license"), "{card}");
    let folder = bench.dir.path().display().to_string();
    assert!(!card.contains(&folder), "a place of this machine stands in it");
    bench.report(&["--card"]); // which is tk's now

    // a new model's directory has no page of the one before
    std::fs::write(bench.path("run/notes.html"), "mine").unwrap();
    let again = ["--task", "text-classification", "--max-length", "48", "--max-steps", "1", "--overwrite"];
    let train = |more: &[&str]| {
        let mut train = tk();
        train.args(["train", "--quiet"]).args(again).arg("--model").arg(models("tiny-bert-single"));
        train
            .arg("--train")
            .arg(bench.path("records.jsonl"))
            .arg("--output")
            .arg(bench.path("run"))
            .args(more);
        train.assert().success();
    };
    train(&["--validation-split", "0.2"]);
    assert!(
        !readme.exists() && !bench.path("run/report.html").exists() && bench.path("run/notes.html").exists()
    );

    // what was drawn to be measured on is drawn again
    let (told, _) = bench.report(&[]);
    assert_eq!(told["metrics"], told["best"]["metrics"]);
    assert_eq!(told["examples"], 6);
    std::fs::write(&readme, "# my own").unwrap();
    train(&[]);
    assert_eq!(std::fs::read_to_string(&readme).unwrap(), "# my own");

    let other = bench.path("other");
    copy_dir(&bench.path("run"), &other);
    refused(&["--overwrite"], &other, "--card");
}
