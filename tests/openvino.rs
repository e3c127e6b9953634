//! The OpenVINO provider, where `./scripts/setup --openvino` has put ONNX Runtime's build that has it; the real binary.

mod common;

use std::path::Path;

use common::{copy, json, max_abs, models, predictors, tk};
use serde_json::Value;

const TEXTS: &str = "{\"text\": \"a good day\"}\n{\"text\": \"no\"}\n{\"text\": \"what a long and dreary afternoon that was\"}\n";

/// What a command says on standard error.
fn error(args: &[&str], dir: &Path, code: i32) -> String {
    // the search for the library is the user's
    let out = tk().args(args).arg(dir).env_remove("ORT_DYLIB_PATH").assert().code(code);
    String::from_utf8_lossy(&out.get_output().stderr).into_owned()
}

/// The logits of texts, as they are served.
fn logits(dir: &Path, texts: &str, flags: &[&str]) -> Vec<f32> {
    let args = ["serve-batch", "--quiet", "--input", "-", "--logits"];
    let out = tk()
        .args(args)
        .args(flags)
        .arg(dir)
        .env_remove("ORT_DYLIB_PATH")
        .write_stdin(texts)
        .assert()
        .success();
    let lines = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    let logits = |line: &str| -> Vec<f32> {
        let line: Value = serde_json::from_str(line).unwrap();
        line["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    };
    lines.lines().flat_map(logits).collect()
}

fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

#[test]
#[ignore = "needs ./scripts/setup --openvino"]
fn every_model_gives_the_trained_ones_logits() {
    for name in predictors() {
        let args = ["parity", "--quiet", "--runtimes", "eager,ort-openvino"];
        tk().args(args).arg(models(name)).env_remove("ORT_DYLIB_PATH").assert().success();
    }
}

#[test]
#[ignore = "needs ./scripts/setup --openvino"]
fn a_record_is_answered_the_same_alone_and_among_others() {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    let together = logits(&dir, TEXTS, &["--ep", "openvino", "--threads", "2"]);
    let alone: Vec<f32> =
        TEXTS.lines().flat_map(|text| logits(&dir, text, &["--ep", "openvino", "--threads", "1"])).collect();
    assert!(max_abs(&together, &alone).0 < 1e-5);
    assert!(max_abs(&together, &logits(&dir, TEXTS, &["--ep", "cpu"])).0 < 1e-5);
}

#[test]
#[ignore = "needs ./scripts/setup --openvino"]
fn what_bf16_loses_is_measured_and_kept() {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    let measure = ["export", "--precision", "bf16", "--ep", "openvino", "--max-metric-drop", "100"];
    let serve = ["serve-batch", "--ep", "openvino", "--precision", "bf16", "--input"];
    let texts = dir.join("texts.jsonl");
    std::fs::write(&texts, TEXTS).unwrap();
    let serve = [&serve[..], &[texts.to_str().unwrap()]].concat();
    if !multiplies_bf16() {
        for args in [&measure[..], &serve, &["parity", "--precision", "bf16"]] {
            assert!(error(args, &dir, 2).contains("this processor multiplies no bf16"));
        }
        return;
    }
    assert!(error(&serve, &dir, 0).contains("what bf16 loses was not measured"));
    assert!(error(&["parity", "--precision", "bf16"], &dir, 2).contains("does not say how far bf16 may be"));
    error(&measure, &dir, 0);
    assert!(!error(&serve, &dir, 0).contains("was not measured"));
    error(&["parity", "--precision", "bf16"], &dir, 0);

    let entry = &json(dir.join("onnx/manifest.json"))["precisions"]["bf16"];
    assert_eq!((&entry["file"], &entry["provider"]), (&"model.onnx".into(), &"openvino".into()));
    assert_eq!(entry["gate"]["metric"], "agreement");
    let apart = entry["max_abs"].as_f64().unwrap();
    assert!(apart > 1e-5, "bf16 was computed in fp32: {apart}");
    let [fp32, bf16] = ["fp32", "bf16"]
        .map(|precision| logits(&dir, TEXTS, &["--ep", "openvino", "--precision", precision]));
    assert!(max_abs(&fp32, &bf16).0 > 1e-5, "{fp32:?}");

    // it was measured on the graph that stands no more
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    assert!(error(&serve, &dir, 0).contains("what bf16 loses was not measured"));

    // whose words flip
    let (_guard, dir) = copy("tiny-bert-masked");
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    let text =
        error(&["export", "--precision", "bf16", "--ep", "openvino", "--max-metric-drop", "0"], &dir, 1);
    assert!(text.contains("more than --max-metric-drop 0 allows"), "{text}");
}
