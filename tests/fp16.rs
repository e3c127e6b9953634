//! Graphs in fp16: weights of half the size, the answers of fp32; the real binary.

mod common;

use std::path::{Path, PathBuf};

use common::{ANSWERERS, LANGUAGE_MODEL, copy, json, predictors, slots_in, tk};
use tk::onnx::proto::ValueInfoProto;
use tk::onnx::proto::tensor_proto::DataType;
use tk::onnx::proto::type_proto::Value;
use tk::onnx::{Precision, write};

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
    let (_guard, dir) = copy("tiny-deberta-v2-single");
    let out = tk().args(["export", "--precision", "fp16"]).arg(&dir).assert().code(2);
    let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(text.contains("--precision fp16: ONNX Runtime 1.31 ends with a fault"), "{text}");
    assert!(!dir.join("onnx").exists());
}

/// The tiny language model, exported in fp32 and in fp16.
fn language_model() -> (tempfile::TempDir, PathBuf) {
    let (guard, dir) = copy(LANGUAGE_MODEL);
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    tk().args(["export", "--quiet", "--precision", "fp16"]).arg(&dir).assert().success();
    (guard, dir)
}

/// What a command prints on standard output.
fn printed(args: &[&str], dir: &Path) -> String {
    let out = tk().args(args).arg(dir).assert().success();
    String::from_utf8_lossy(&out.get_output().stdout).into_owned()
}

/// What a command says that is refused.
fn refused(args: &[&str], dir: &Path) -> String {
    let out = tk().args(args).arg(dir).assert().code(2);
    String::from_utf8_lossy(&out.get_output().stderr).into_owned()
}

#[test]
fn a_language_models_cache_and_weights_are_in_fp16_and_its_scores_in_fp32() {
    let (_guard, dir) = language_model();
    let graph = write::load(&dir.join("onnx/generate_fp16.onnx")).unwrap().graph.unwrap();
    let kinds = |outlets: &[ValueInfoProto]| -> Vec<(String, DataType)> {
        let kind = |outlet: &ValueInfoProto| match outlet.r#type.as_ref().unwrap().value.as_ref().unwrap() {
            Value::TensorType(tensor) => DataType::try_from(tensor.elem_type).unwrap(),
            other => panic!("{other:?}"),
        };
        outlets.iter().map(|outlet| (outlet.name.clone(), kind(outlet))).collect()
    };
    let caches = |prefix: &str| {
        let name = |layer, what| (format!("{prefix}.{layer}.{what}"), DataType::Float16);
        [(0, "key"), (0, "value"), (1, "key"), (1, "value")].map(|(layer, what)| name(layer, what))
    };
    let mut inputs = kinds(&graph.input);
    let others: Vec<_> = inputs.extract_if(.., |(name, _)| !name.starts_with("past_key_values.")).collect();
    assert!(others.iter().all(|(_, kind)| matches!(kind, DataType::Int64 | DataType::Int32)), "{others:?}");
    assert_eq!(inputs, caches("past_key_values"));
    let mut outputs = kinds(&graph.output);
    assert_eq!(outputs.remove(0), ("logits".to_owned(), DataType::Float));
    assert_eq!(outputs, caches("present"));
    let weights = graph.initializer.iter().filter(|tensor| tensor.data_type == DataType::Float as i32);
    assert_eq!(weights.count(), 0);
    // what CUDA has no kernel for in fp32
    let attention = graph.node.iter().find(|node| node.op_type == "GroupQueryAttention").unwrap();
    let from_cast =
        |name: &String| graph.node.iter().any(|node| node.op_type == "Cast" && node.output.contains(name));
    assert!(!attention.input.iter().any(from_cast));
}

#[test]
fn a_language_model_in_fp16_is_held_against_what_was_trained() {
    let (_guard, dir) = language_model();
    let entry = &json(dir.join("onnx/manifest.json"))["generate"]["fp16"];
    assert_eq!(entry["file"], "generate_fp16.onnx");
    let apart = entry["max_abs"].as_f64().unwrap();
    assert!(apart > 1e-4 && apart < 0.1, "{apart}");
    let [before, after] = ["perplexity_fp32", "perplexity"].map(|name| entry[name].as_f64().unwrap());
    assert!((after / before - 1.0).abs() < 0.01 && after != before, "{before} {after}");

    let parity = ["parity", "--precision", "fp16", "--json", "--runtimes", "eager,ort-cpu"];
    let found: serde_json::Value = serde_json::from_str(&printed(&parity, &dir)).unwrap();
    assert_eq!(found["runtimes"].as_array().unwrap().len(), 1, "{found}");
    assert_eq!(found["runtimes"][0]["name"], "ort-cpu-in-place");
    assert!((found["runtimes"][0]["tolerance"].as_f64().unwrap() / apart - 2.0).abs() < 1e-3, "{found}");
    tk().args(parity).args(["--tolerance", "1e-5"]).arg(&dir).assert().code(1);
    let runtimes = ["parity", "--precision", "fp16", "--runtimes", "eager,candle-onnx"];
    assert!(refused(&runtimes, &dir).contains("candle-onnx knows no products in fp16"));

    let export = ["export", "--precision", "fp16"];
    let drop = [&export[..], &["--max-metric-drop", "1"]].concat();
    assert!(refused(&drop, &dir).contains("give --max-perplexity-increase"));
    let opset = [&export[..], &["--opset", "20"]].concat();
    assert!(refused(&opset, &dir).contains("--opset and --external-data say nothing to --precision fp16"));
}

#[test]
fn texts_in_fp16_are_those_of_fp32_whoever_stands_beside_whom() {
    let (_guard, dir) = language_model();
    let prompts = dir.with_extension("jsonl");
    let records = [
        r#"{"prompt": "the film"}"#,
        r#"{"prompt": "a long prompt that is read before others", "num_beams": 3, "max_new_tokens": 6}"#,
        r#"{"prompt": "x", "max_new_tokens": 30}"#,
        r#"{"prompt": "the film", "max_new_tokens": 1}"#,
    ];
    std::fs::write(&prompts, records.join("\n")).unwrap();
    let args = ["serve-batch", "--quiet", "--max-new-tokens", "12", "--input"];
    let texts = |more: &[&str]| printed(&[&args[..], &[prompts.to_str().unwrap()], more].concat(), &dir);
    let expected = texts(&[]);
    assert_eq!(expected.lines().count(), 4);
    for more in [&["--ep", "cpu"][..], &["--ep", "auto", "--slots", "2"], &["--slots", "1", "--window", "2"]]
    {
        assert_eq!(texts(&[&["--precision", "fp16"], more].concat()), expected, "{more:?}");
    }
    let generate = ["generate", "--precision", "fp16", "--max-new-tokens", "12"];
    let text = tk().args(generate).arg(&dir).arg("the film").assert().success();
    let first: serde_json::Value = serde_json::from_str(expected.lines().next().unwrap()).unwrap();
    let text = String::from_utf8_lossy(&text.get_output().stdout).into_owned();
    assert_eq!(text.trim_end_matches('\n'), first["text"].as_str().unwrap());

    // a number of the cache takes half the bytes
    let bytes = [Precision::Fp32, Precision::Fp16].map(|precision| slots_in(&dir, precision).token_bytes());
    assert_eq!(bytes[0], 2 * bytes[1]);
}

#[test]
fn where_texts_can_not_be_generated_is_said_with_what_to_do() {
    let (_guard, dir) = language_model();
    // the plain build, wherever another one may lie
    let library = &tk::runtime::library::library().unwrap().path;
    for command in [
        &["generate"][..],
        &["bench"],
        &["serve-batch", "--input", "-"],
        &["serve", "--listen", "127.0.0.1:0"],
    ] {
        for (args, wanted) in [
            (
                &["--ep", "cuda"][..],
                "GroupQueryAttention has no fp32 kernel for CUDA, which --precision fp32 asks for",
            ),
            (&["--ep", "cuda,cpu"], "give --precision fp16, or leave --ep out"),
            (&["--ep", "cuda", "--precision", "q8"], "which --precision q8 asks for"),
            (
                &["--ep", "cuda", "--precision", "fp16", "--device-id", "0"],
                "is built without CUDAExecutionProvider",
            ),
            (&["--ep", "tensorrt", "--precision", "fp16"], "on cpu, and with --precision fp16 on cuda"),
            (&["--ep", "openvino"], "on cpu, and with --precision fp16 on cuda"),
            (&["--precision", "fp16", "--gpu-memory-mb", "9"], "--gpu-memory-mb is for cuda and tensorrt"),
            (&["--precision", "int8"], "a causal-lm model is exported in fp32, fp16, q8, q4"),
        ] {
            let out = tk().args(command).args(args).arg(&dir).env("ORT_DYLIB_PATH", library).assert().code(2);
            let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
            assert!(text.contains(wanted), "{command:?} {args:?}: {text}");
        }
    }
}
