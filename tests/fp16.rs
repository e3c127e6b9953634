//! Graphs in fp16: weights of half the size, the answers of fp32; the real binary.

mod common;

use common::{ANSWERERS, copy, json, predictors, tk};
use tk::onnx::proto::tensor_proto::DataType;
use tk::onnx::write;

#[test]
fn every_model_is_exported_in_fp16_and_answers_as_in_fp32() {
    for model in predictors().chain(ANSWERERS).filter(|model| !model.contains("deberta")) {
        let (_guard, dir) = copy(model);
        // weights that were drawn give answers that hang by a hair
        let args = ["export", "--quiet", "--precision", "fp16", "--max-metric-drop", "3"];
        tk().args(args).arg(&dir).assert().success();
        let entry = &json(dir.join("onnx/manifest.json"))["precisions"]["fp16"];
        assert_eq!(entry["file"], "model_fp16.onnx", "{model}");
        let apart = entry["max_abs"].as_f64().unwrap();
        assert!(apart > 1e-5 && apart < 0.1, "{model}: {apart}");
        tk().args(["parity", "--precision", "fp16", "--quiet"]).arg(&dir).assert().success();

        let graph = write::load(&dir.join("onnx/model_fp16.onnx")).unwrap().graph.unwrap();
        let wide: Vec<&str> = graph
            .initializer
            .iter()
            .filter(|tensor| tensor.data_type == DataType::Float as i32 && tensor.raw_data.len() > 4 * 64)
            .map(|tensor| tensor.name.as_str())
            .collect();
        assert!(wide.is_empty(), "{model}: {wide:?} stay in fp32");
    }
}

#[test]
fn what_has_no_fp16_says_so() {
    for (model, wanted) in [
        ("tiny-gpt2-lm", "--precision fp16: a causal-lm model is exported in fp32, q8, q4"),
        ("tiny-deberta-v2-single", "--precision fp16: ONNX Runtime 1.31 ends with a fault"),
    ] {
        let (_guard, dir) = copy(model);
        let out = tk().args(["export", "--precision", "fp16"]).arg(&dir).assert().code(2);
        let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(text.contains(wanted), "{text}");
        assert!(!dir.join("onnx").exists());
    }
}
