//! `tk parity`, the real binary: runtimes agree on awkward records, and where a graph is wrong it says where.

mod common;

use std::path::Path;

use common::{LANGUAGE_MODEL, TAGGERS, copy, copy_dir, models, predictors, records_file, tk};
use serde_json::{Value, json};
use tk::onnx::proto::GraphProto;
use tk::onnx::{GraphKind, model, write};
use tk::parity::inputs;
use tk::saved::Saved;

fn parity(dir: &Path, args: &[&str], code: i32) -> (Value, String) {
    let out = tk().arg("parity").arg(dir).arg("--json").args(args).assert().code(code);
    let output = out.get_output();
    let result = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (result, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Writes a graph of the model as it would be exported, after a change to one of its weights.
fn export_changed(dir: &Path, weight: &str, change: f32) {
    let saved = Saved::open(dir).unwrap();
    let hash = saved.tokenizer.hash();
    let mut model = model::build(
        &saved.config,
        &saved.task,
        &saved.weights,
        hash,
        GraphKind::fp32(saved.task.form(), 18),
    )
    .unwrap();
    let initializers = &mut model.graph.as_mut().unwrap().initializer;
    let tensor = initializers.iter_mut().find(|tensor| tensor.name == weight).unwrap();
    let first = f32::from_le_bytes(tensor.raw_data[..4].try_into().unwrap());
    tensor.raw_data[..4].copy_from_slice(&(first + change).to_le_bytes());
    std::fs::create_dir_all(dir.join("onnx")).unwrap();
    write::save(model, &dir.join("onnx/model.onnx"), false).unwrap();
}

#[test]
fn all_runtimes_of_this_machine_agree_on_awkward_records() {
    for name in predictors() {
        let (result, text) = parity(&models(name), &[], 0);
        assert_eq!(result["pass"], true);
        let compared = result["runtimes"].as_array().unwrap();
        let names: Vec<&str> = compared.iter().map(|c| c["name"].as_str().unwrap()).collect();
        assert!(names.starts_with(&["candle-onnx", "ort-cpu"]), "{names:?}");
        for c in compared {
            assert_eq!(
                (c["compared_with"].as_str(), c["first_difference"].as_null()),
                (Some("eager"), Some(()))
            );
            assert!(c["max_abs"].as_f64().unwrap() < 1e-5, "{c}");
            assert_eq!((c["argmax_agreement"].as_f64(), c["pass"].as_bool()), (Some(1.0), Some(true)));
        }
        // nothing was exported, and that is said
        assert!(text.contains("comparing the graph that `tk export` would write"), "{text}");
    }
}

#[test]
fn the_built_in_records_are_awkward() {
    let saved = Saved::open(&models("tiny-bert-single")).unwrap();
    let texts = inputs::builtin(&saved).unwrap();
    let encodings = saved.tokenizer.encode_all(&texts, saved.max_length).unwrap();
    let lengths: Vec<usize> = encodings.iter().map(|encoding| encoding.len()).collect();
    assert_eq!(lengths[0], 2, "empty text: only special tokens");
    assert!(lengths.contains(&3), "one token");
    let whole = |i: &usize| lengths[*i] == saved.max_length && !encodings[*i].truncated;
    assert!((0..lengths.len()).any(|i| whole(&i)), "exactly the maximum");
    assert!(lengths.contains(&(saved.max_length - 1)), "one less");
    assert!(encodings.iter().filter(|encoding| encoding.truncated).count() > 3, "over the maximum");
    assert!(encodings.iter().any(|encoding| encoding.type_ids.contains(&1)), "pairs");
    for batch in lengths.chunks(8) {
        assert!(batch.iter().max() > batch.iter().min(), "padding in every batch");
    }
    let all: String = texts.iter().map(|(text, _)| text.as_str()).collect();
    for c in ['\0', '\u{301}', '中', '\u{200d}', 'ש', '\u{10ffff}', '\u{1b}'] {
        assert!(all.contains(c), "{c:?}");
    }
}

#[test]
fn a_graph_that_differs_fails_with_the_place_where_it_does() {
    let (_guard, dir) = copy("tiny-bert-single");
    for (weight, tap) in [
        ("bert.embeddings.LayerNorm.bias", "bert.embeddings"),
        ("bert.encoder.layer.1.attention.self.value.bias", "bert.encoder.layer.1.attention"),
        ("bert.encoder.layer.1.intermediate.dense.bias", "bert.encoder.layer.1"),
        ("bert.pooler.dense.bias", "bert.pooler"),
        ("classifier.bias", "logits"),
    ] {
        export_changed(&dir, weight, 0.5);
        let (result, text) = parity(&dir, &[], 1);
        assert!(text.contains("ort-cpu differ from eager by more than 0.0001"), "{text}");
        assert_eq!(result["pass"], false);
        let compared = &result["runtimes"];
        assert_eq!(compared[0]["pass"], true, "candle-onnx builds its own graph");
        assert_eq!((&compared[1]["name"], &compared[1]["pass"]), (&"ort-cpu".into(), &false.into()));
        let difference = &compared[1]["first_difference"];
        assert_eq!(difference["tap"], tap, "{difference}");
        let expected = difference["expected"].as_f64().unwrap();
        assert!((expected - difference["found"].as_f64().unwrap()).abs() > 1e-4, "{difference}");
    }
    // a tolerance that allows it
    export_changed(&dir, "classifier.bias", 0.5);
    let (result, _) = parity(&dir, &["--tolerance", "0.6"], 0);
    assert_eq!(result["runtimes"][1]["tolerance"].as_f64().map(|t| t as f32), Some(0.6));
}

#[test]
fn the_users_records_are_compared_and_reported() {
    let (guard, dir) = copy("tiny-bert-single");
    tk().arg("export").arg(&dir).assert().success();
    let (input, page) = (guard.path().join("in.jsonl"), guard.path().join("page.html"));
    records_file("tiny-bert-single", 1, &input);
    let args = ["--input", input.to_str().unwrap(), "--report", page.to_str().unwrap()];
    let (result, _) = parity(&dir, &args, 0);
    let lines = std::fs::read_to_string(&input).unwrap().lines().count();
    assert_eq!(result["runtimes"][1]["records"].as_u64(), Some(lines as u64));
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("<td>ort-cpu</td><td>eager</td>") && page.contains("ort-cuda"), "{page}");

    assert!(
        parity(&dir, &["--report", "/absent/page.html"], 2).1.contains("the folder /absent is not there")
    );
    let (_, text) = parity(&dir, &["--input", input.to_str().unwrap(), "--text-column", "x"], 2);
    assert!(text.contains("\"x\""), "{text}");
    let (_, text) = parity(&dir, &["--input", input.to_str().unwrap(), "--label-column", "x"], 2);
    assert!(text.contains("--label-column says nothing where texts alone are read"), "{text}");
    assert!(parity(&dir, &["--text-column", "x"], 2).1.contains("flags of records are for an --input"));
}

#[test]
fn a_tasks_metric_is_measured_by_every_runtime() {
    for (model, name) in [("tiny-bert-single", "accuracy"), (TAGGERS[2], "f1"), (LANGUAGE_MODEL, "loss")] {
        let (guard, dir) = copy(model);
        let input = guard.path().join("in.jsonl");
        records_file(model, 1, &input);
        tk().arg("export").arg(&dir).assert().success();
        let measure = |command: &[&str]| -> Value {
            let mut tk = tk();
            tk.args([command[0], "--json"]).arg(&dir).args(&command[1..]).arg("--input").arg(&input);
            serde_json::from_slice(&tk.assert().success().get_output().stdout).unwrap()
        };
        let expected = &measure(&["eval"])["metrics"][name];
        let result = measure(&["parity", "--metrics"]);
        let metrics: Vec<&Value> = result["runtimes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|runtime| &runtime["metric"])
            .filter(|metric| !metric.is_null())
            .collect();
        assert_eq!(metrics.len(), if model == LANGUAGE_MODEL { 1 } else { 2 }, "{result}");
        for metric in metrics {
            assert_eq!((&metric["name"], &metric["expected"]), (&json!(name), expected), "{model}");
            let apart = metric["found"].as_f64().unwrap() / expected.as_f64().unwrap() - 1.0;
            assert!(apart.abs() < 1e-4, "{model}: {metric}");
        }
    }
}

#[test]
fn a_runtime_that_is_asked_for_and_not_there_is_an_error() {
    let dir = models("tiny-bert-single");
    let (_, text) = parity(&dir, &["--runtimes", "eager,ort-cuda"], 2);
    assert!(text.contains("CUDA"), "{text}");
    assert!(parity(&dir, &["--runtimes", "eager"], 2).1.contains("nothing to compare"));
    assert!(parity(&dir, &["--runtimes", "eager,torch"], 2).1.contains("\"torch\" is no runtime"));
    let (result, _) = parity(&dir, &["--runtimes", "ort-cpu,eager"], 0);
    assert_eq!(result["runtimes"][0]["compared_with"], "eager");
}

#[test]
fn a_graph_of_others_is_held_against_the_model_that_it_is_of() {
    let dir = tempfile::tempdir().unwrap();
    let (own, model) = (dir.path().join("own"), models("tiny-bert-answers"));
    copy_dir(&model, &own);
    tk().args(["export", "--quiet"]).arg(&own).assert().success();
    let (other, exported) = (dir.path().join("other.onnx"), own.join("onnx/model.onnx"));
    let changed = |change: &dyn Fn(&mut GraphProto)| {
        let mut graph = write::load(&exported).unwrap();
        change(graph.graph.as_mut().unwrap());
        write::save(graph, &other, false).unwrap();
        let mut command = tk();
        command.arg("parity").arg("--onnx").arg(&other).arg("--against").arg(&model).arg("--json");
        command.assert()
    };
    let result = |assert: assert_cmd::assert::Assert| -> Value {
        serde_json::from_slice(&assert.get_output().stdout).unwrap()
    };
    // its outputs stand in another order, beside one that tk does not know
    let same = result(changed(&|graph| graph.output.reverse()).success());
    let compared = &same["runtimes"][0];
    assert_eq!((&compared["name"], same["runtimes"].as_array().unwrap().len()), (&json!("ort-cpu"), 1));
    for name in ["start_logits", "end_logits"] {
        let output = &compared["outputs"][name];
        assert!(output["max_abs"].as_f64().unwrap() < 1e-5 && output["pass"] == true, "{output}");
        assert!(output["mean_abs"].as_f64().unwrap() <= output["max_abs"].as_f64().unwrap());
    }
    assert!(compared["batch_invariance"].as_f64().unwrap() < 1e-5, "{compared}");

    let differs = result(
        changed(&|graph| {
            let bias = graph.initializer.iter_mut().find(|tensor| tensor.name == "qa_outputs.bias").unwrap();
            let end = f32::from_le_bytes(bias.raw_data[4..].try_into().unwrap());
            bias.raw_data[4..].copy_from_slice(&(end + 0.5).to_le_bytes());
        })
        .code(1),
    );
    let compared = &differs["runtimes"][0];
    assert_eq!(compared["outputs"]["start_logits"]["pass"], true);
    assert_eq!(compared["outputs"]["end_logits"]["pass"], false);
    assert_eq!(compared["first_difference"]["tap"], "end_logits");

    let lacking = changed(&|graph| graph.output.truncate(1)).code(2);
    let said = String::from_utf8_lossy(&lacking.get_output().stderr).into_owned();
    assert!(said.contains("has no output end_logits; it has start_logits"), "{said}");
    let mut without = tk();
    without.arg("parity").arg("--onnx").arg(&exported).arg("--against").arg(&model);
    let without = without.env("ORT_DYLIB_PATH", dir.path().join("none.so")).assert().code(2);
    let said = String::from_utf8_lossy(&without.get_output().stderr).into_owned();
    assert!(said.contains("nothing to run the graph by"), "nothing that is compared is no agreement: {said}");
    let usage = tk().args(["parity", "--onnx", "x.onnx"]).assert().code(2);
    assert!(String::from_utf8_lossy(&usage.get_output().stderr).contains("--against"));
}
