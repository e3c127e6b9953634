//! `tk bench`: what it tells fits together; the real binary. No time is asserted.

mod common;

use std::path::Path;

use common::{copy, tk};
use serde_json::Value;

fn bench(dir: &Path, args: &[&str]) -> Value {
    let out =
        tk().args(["bench", "--json", "--quiet", "--seconds", "0.01"]).args(args).arg(dir).assert().success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

fn exported(model: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let (guard, dir) = copy(model);
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    (guard, dir)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_shape_and_whole_records_are_measured() {
    for model in [
        "tiny-bert-single",
        "tiny-bert-tokens",
        "tiny-bert-answers",
        "tiny-bert-masked",
        "tiny-bert-embedding",
    ] {
        let (_guard, dir) = exported(model);
        let found = bench(&dir, &["--lengths", "4,8", "--batches", "1,3", "--threads", "2"]);
        let cells = found["cells"].as_array().unwrap();
        let shapes: Vec<_> =
            cells.iter().map(|cell| (number(&cell["length"]), number(&cell["batch"]))).collect();
        assert_eq!(shapes, [(4.0, 1.0), (4.0, 3.0), (8.0, 1.0), (8.0, 3.0)], "{model}");
        for cell in cells {
            let [p50, p90, p99] = ["p50_ms", "p90_ms", "p99_ms"].map(|name| number(&cell[name]));
            assert!(0.0 < p50 && p50 <= p90 && p90 <= p99, "{model}: {cell}");
            assert!(number(&cell["runs"]) >= 10.0, "five at least on each of two threads: {cell}");
            let tokens = number(&cell["records_per_second"]) * number(&cell["length"]);
            assert!((tokens / number(&cell["tokens_per_second"]) - 1.0).abs() < 1e-9, "{cell}");
        }
        assert_eq!(found["load"]["threads"], 2);
        assert!(number(&found["load"]["nodes"]["CPUExecutionProvider"]) > 10.0, "{model}: {found}");
        let records = &found["records"];
        assert_eq!(records["errors"], 0, "{model}: {records}");
        assert!(
            number(&records["records"]) > 200.0 && number(&records["padding"]) >= 1.0,
            "{model}: {records}"
        );
        assert!(found["machine"]["onnxruntime"].as_str().unwrap().starts_with("1."));
    }
}

#[test]
fn records_of_a_file_are_counted_with_those_that_can_not_be_used() {
    let (_guard, dir) = exported("tiny-bert-single");
    let input = dir.join("records.jsonl");
    std::fs::write(&input, "{\"text\": \"a good day\"}\n{\"texts\": \"b\"}\n{\"text\": \"no\"}\n").unwrap();
    let found = bench(&dir, &["--lengths", "4", "--batches", "1", "--input", input.to_str().unwrap()]);
    assert_eq!((&found["records"]["records"], &found["records"]["errors"]), (&3.into(), &1.into()));
}

#[test]
fn a_soak_compares_every_pass_with_the_first() {
    let (_guard, dir) = exported("tiny-bert-single");
    let found = bench(&dir, &["--soak", "0.3"]);
    assert_eq!(
        (&found["soak"]["other_answers"], &found["soak"]["pass"]),
        (&0.into(), &true.into()),
        "{found}"
    );
    assert!(number(&found["soak"]["passes"]) >= 2.0);
}

#[test]
fn a_language_model_reads_and_generates() {
    let (_guard, dir) = exported("tiny-gpt2-lm");
    let found = bench(&dir, &["--lengths", "4,8", "--batches", "1,2"]);
    let cells = found["cells"].as_array().unwrap();
    assert_eq!(cells.len(), 4);
    for cell in cells {
        assert!(
            number(&cell["prefill_ms"]) > 0.0 && number(&cell["decode_tokens_per_second"]) > 0.0,
            "{cell}"
        );
    }
}

#[test]
fn what_can_not_be_measured_is_refused_by_name() {
    let (_guard, dir) = exported("tiny-bert-single");
    let (_guard, lm) = exported("tiny-gpt2-lm");
    let (_guard, fresh) = copy("tiny-bert-single");
    for (dir, args, wanted) in [
        (&fresh, &[][..], "run `tk export"),
        (&dir, &["--lengths", "0"], "numbers above 0"),
        (&dir, &["--lengths", "1000"], "the model takes 64 tokens at most"),
        (&dir, &["--lengths", "64", "--batches", "99999999"], "are more than"),
        (&dir, &["--seconds", "0"], "--seconds 0: expected a number of seconds above 0"),
        (&dir, &["--soak", "-1"], "unexpected argument"),
        (&dir, &["--precision", "q4"], "a text-classification model is exported in"),
        (&lm, &["--soak", "1"], "--soak is for models that answer records"),
        (&lm, &["--ep", "cuda"], "GroupQueryAttention has no fp32 kernel for CUDA"),
    ] {
        let out = tk().arg("bench").args(args).arg(dir).assert().code(2);
        let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(text.contains(wanted), "{args:?}: {text}");
    }
}
