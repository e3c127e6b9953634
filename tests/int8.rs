//! Graphs in int8: their products are the integers that the operators say, and they are put in place as far as the
//! answers stay what they are.

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{ANSWERERS, copy, json, models, predictors, tk};
use prost::Message;
use serde_json::Value;
use tk::data::batch::{Encoding, PaddedBatch};
use tk::model::ops::{At, Ids, Linear, Ops, Param};
use tk::onnx::{GraphKind, OPSETS, emit, int8, write};
use tk::runtime::session::{Model, OrtSession, Threads};
use tk::runtime::{Provider, Providers};
use tk::say::Say;
use tk::task::{Dim, Output};

/// The largest number of a rounded matrix, so that pairs of products fit into 16 bits.
const MULTIPLIED: f32 = 64.0;

/// Rows that make bytes of all sizes, and matrices whose columns are of very different sizes.
fn value(param: &Param, i: usize) -> f32 {
    let seed = param.name.bytes().map(usize::from).sum::<usize>();
    let noise = ((i * 2_654_435_761 + seed * 97) % 1009) as f32 / 1009.0 - 0.4;
    noise * if i.is_multiple_of(7) { 8.0 } else { 1.0 }
}

fn values(param: &Param) -> Vec<f32> {
    (0..param.numel()).map(|i| value(param, i)).collect()
}

/// The largest number of each channel stays exact, all others are the nearest.
fn rounded(values: &[f32], most: f32) -> (Vec<f32>, f32) {
    let scale = values.iter().fold(0f32, |most, x| most.max(x.abs())) / most;
    (values.iter().map(|x| (x / scale).round_ties_even()).collect(), scale)
}

/// `DynamicQuantizeLinear`, or `QuantizeLinear` of a range: bytes less their zero, and their scale.
fn bytes(x: &[f32], range: Option<(f32, f32)>) -> (Vec<f32>, f32) {
    let of_x = || x.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let (low, high) = range.unwrap_or_else(of_x);
    let scale = (high - low) / 255.0;
    let zero = (-low / scale).round_ties_even().clamp(0.0, 255.0);
    (x.iter().map(|x| ((x / scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero).collect(), scale)
}

#[test]
fn a_product_is_the_integers_that_its_operators_say() {
    let (tokens, width, outputs) = (9, 70, 24);
    let table = At::body("x").table(tokens, width);
    let cases: [(&str, Linear); 4] = [
        ("(out, in)", At::body("f").linear(width, outputs)),
        ("without a bias", At::body("f").linear(width, outputs).without_bias()),
        ("(in, out)", At::body("f").conv1d(width, outputs)),
        ("tied", At::body("x").table(tokens.max(16), width).tied()),
    ];
    // the range holds some of the numbers, and some it cuts off
    for ((name, map), range) in
        cases.iter().flat_map(|case| [None, Some((-1.5, 2.0))].map(|range| (case.clone(), range)))
    {
        let table = if name == "tied" { At::body("x").table(16, width) } else { table.clone() };
        let outputs = map.output();
        let output = Output { name: "y", dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(outputs)] };
        let ids: Vec<u32> = vec![3, 1, 8, 0, 5];
        // what is looked up, by rows of their own scales
        let whole = values(&table.weight);
        let row = |id: u32| &whole[id as usize * width..][..width];
        let most = if name == "tied" { MULTIPLIED } else { 127.0 };
        let x: Vec<f32> = ids
            .iter()
            .flat_map(|&id| {
                let (numbers, scale) = rounded(row(id), most);
                numbers.into_iter().map(move |q| q * scale)
            })
            .collect();
        let (x, scale) = bytes(&x, range);
        let matrix = values(&map.weight);
        let bias = map.bias.as_ref().map(values);
        let mut wanted = Vec::new();
        for row in x.chunks(width) {
            for n in 0..outputs {
                let column: Vec<f32> = match name {
                    "(in, out)" => (0..width).map(|k| matrix[k * outputs + n]).collect(),
                    _ => matrix[n * width..][..width].to_vec(),
                };
                let (column, of_column) = rounded(&column, MULTIPLIED);
                let product: f64 = row.iter().zip(&column).map(|(a, b)| f64::from(a * b)).sum();
                wanted.push(product as f32 * (scale * of_column) + bias.as_ref().map_or(0.0, |bias| bias[n]));
            }
        }
        let ranges: BTreeMap<String, (f32, f32)> =
            range.iter().map(|&range| (map.weight.name.clone(), range)).collect();
        for opset in OPSETS {
            let model = emit::graph(
                |o| Ok(vec![o.linear(map.clone(), &o.embed(table.clone(), Ids::Tokens)?)?]),
                std::slice::from_ref(&output),
                GraphKind::int8(Vec::new(), ranges.clone(), opset),
                |param| Ok(Cow::Owned(values(param))),
            )
            .unwrap();
            let file = model.encode_to_vec();
            let cpu = Providers::only(Provider::Cpu);
            let session =
                OrtSession::open(Model::Bytes(&file), &cpu, Threads::Together(1), Say::default()).unwrap();
            let tokens = Encoding { ids: ids.clone(), type_ids: vec![0; ids.len()], truncated: false };
            let found = session.run(&PaddedBatch::new(&[&tokens], 0)).unwrap().remove(0).array;
            let (apart, at) = common::max_abs(found.as_slice().unwrap(), &wanted);
            assert!(apart < 2e-5, "{name}, {range:?}, opset {opset}: {apart:e} at {at}");
        }
    }
}

/// What `tk export --precision int8` says.
fn export(dir: &Path, args: &[&str]) -> Value {
    let out = tk().args(["export", "--precision", "int8", "--json"]).arg(dir).args(args).assert().success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

/// What a command that fails so says.
fn error(args: &[&str], dir: &Path, code: i32) -> String {
    let (command, args) = args.split_first().unwrap();
    let out = tk().arg(command).arg(dir).args(args).assert().code(code);
    String::from_utf8(out.get_output().stderr.clone()).unwrap()
}

#[test]
fn every_model_is_exported_in_int8_and_held_against_fp32() {
    for model in predictors().chain(ANSWERERS) {
        let (_guard, dir) = copy(model);
        // weights that were drawn give no answers that could be kept
        let found = export(&dir, &["--max-metric-drop", "100"]);
        let file = dir.join("onnx/model_quantized.onnx");
        let graph = write::load(&file).unwrap();
        assert!(int8::weights(&graph).len() >= 9, "{model}: {:?}", int8::weights(&graph));
        assert_eq!(found["in_fp32"], Value::Array(Vec::new()), "{model}");
        assert!(found["gate"]["after"].as_f64().unwrap() > 0.5, "{model}: {found}");

        let manifest = json(dir.join("onnx/manifest.json"));
        let entry = &manifest["precisions"]["int8"];
        for key in ["gate", "max_abs", "batch_invariance", "form", "max_metric_drop", "weights_sha256"] {
            assert!(!entry[key].is_null(), "{model}: {key} of {entry}");
            assert_eq!(entry[key], found[key], "{model}");
        }
        assert_eq!(entry["sha256"], tk::checkpoint::file_hash(&file).unwrap());
        tk().args(["parity", "--precision", "int8", "--quiet"]).arg(&dir).assert().success();
        assert!(!dir.join("onnx/model.onnx").exists(), "what was exported in fp32 stays what it is");
    }
}

/// Records of any task, without labels.
fn unlabelled(dir: &Path) -> PathBuf {
    let record = |i: usize| {
        let (text, pair) =
            (["a good day ", "no ", "it rains "][i % 3].repeat(1 + i % 5), "and then the sun came out");
        serde_json::json!({"text": format!("{text}[MASK] <mask>"), "text_pair": pair, "question": text, "context": pair})
    };
    let path = dir.join("calibration.jsonl");
    std::fs::write(&path, (0..30).map(|i| format!("{}\n", record(i))).collect::<String>()).unwrap();
    path
}

#[test]
fn with_ranges_from_records_no_answer_depends_on_those_beside_it() {
    for model in predictors().chain(ANSWERERS) {
        let (_guard, dir) = copy(model);
        let records = unlabelled(&dir);
        let calibration = ["--calibration", records.to_str().unwrap(), "--max-metric-drop", "100"];
        let found = export(&dir, &calibration);
        assert_eq!(found["form"], "static", "{model}");
        let beside = found["batch_invariance"].as_f64().unwrap();
        assert!(beside < 1e-5, "{model}: {beside}");
        assert!(found["gate"]["after"].as_f64().unwrap() > 0.5, "{model}: {found}");
        let graph = write::load(&dir.join("onnx/model_quantized.onnx")).unwrap().graph.unwrap();
        assert!(graph.node.iter().all(|node| node.op_type != "DynamicQuantizeLinear"), "{model}");
        assert!(graph.node.iter().filter(|node| node.op_type == "QuantizeLinear").count() >= 4, "{model}");
        tk().args(["parity", "--precision", "int8", "--quiet"]).arg(&dir).assert().success();
    }
}

#[test]
fn records_that_can_not_be_calibrated_on_are_named_with_their_place() {
    let (_guard, dir) = copy("tiny-bert-single");
    let path = dir.join("bad.jsonl");
    let given = path.to_str().unwrap();
    for (content, wanted) in [
        ("{\"text\": \"a\"}\n{\"texts\": \"b\"}\n", "bad.jsonl:2: "),
        ("", "there is no record to calibrate on"),
    ] {
        std::fs::write(&path, content).unwrap();
        let text = error(&["export", "--precision", "int8", "--calibration", given], &dir, 2);
        assert!(text.contains(wanted), "{text}");
    }
    let text = error(&["export", "--calibration", given], &dir, 2);
    assert!(text.contains("--calibration is for int8"), "{text}");
    assert!(!dir.join("onnx").exists());
}

/// Texts, and the labels that the model gives them in fp32.
fn labelled(dir: &Path) -> PathBuf {
    let words =
        ["I", "love", "rain", "never", "the", "sun", "a", "bad", "day", "good", "film", "and", "night"];
    let text = |i: usize| -> String {
        let word = |k: usize| words[(i * 7 + k * k * 5 + i * k) % words.len()];
        (0..3 + i % 9).map(word).collect::<Vec<_>>().join(" ")
    };
    let texts: String = (0..200).map(|i| format!("{}\n", text(i))).collect();
    let (input, output) = (dir.join("texts.txt"), dir.join("labelled.jsonl"));
    std::fs::write(&input, texts).unwrap();
    tk().args(["export", "--quiet"]).arg(dir).assert().success();
    let out = tk().arg("serve-batch").arg(dir).arg("--input").arg(&input).assert().success();
    let answers = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    let label = |(i, line): (usize, &str)| {
        let answer: Value = serde_json::from_str(line).unwrap();
        serde_json::json!({"text": text(i), "label": answer["label"]}).to_string() + "\n"
    };
    std::fs::write(&output, answers.lines().enumerate().map(label).collect::<String>()).unwrap();
    output
}

#[test]
fn the_matrices_that_lose_most_stay_in_fp32_until_the_metric_holds() {
    let (_guard, dir) = copy("tiny-bert-single");
    let input = labelled(&dir);
    let input = input.to_str().unwrap();
    let loose = export(&dir, &["--input", input, "--max-metric-drop", "100"]);
    assert_eq!(
        (loose["gate"]["metric"].as_str(), loose["gate"]["before"].as_f64()),
        (Some("accuracy"), Some(1.0))
    );
    let lost = loose["gate"]["drop"].as_f64().unwrap();
    assert!(lost > 1.0, "{loose}");

    let most = format!("{}", lost / 2.0);
    let strict = export(&dir, &["--input", input, "--max-metric-drop", &most]);
    let kept = strict["in_fp32"].as_array().unwrap();
    assert!(!kept.is_empty() && strict["gate"]["drop"].as_f64().unwrap() <= lost / 2.0, "{strict}");
    // and that is what is served, and measured
    let graph = write::load(&dir.join("onnx/model_quantized.onnx")).unwrap();
    assert!(kept.iter().all(|name| !int8::weights(&graph).contains(&name.as_str().unwrap().to_owned())));
    let args = ["eval", "--runtime", "onnx", "--precision", "int8", "--json", "--input", input];
    let out = tk().args(args).arg(&dir).assert().success();
    let found: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(found["metrics"]["accuracy"], strict["gate"]["after"]);

    let text = error(&["export", "--precision", "int8", "--max-metric-drop=-1", "--input", input], &dir, 2);
    assert!(text.contains("--max-metric-drop -1: expected a number from 0 upwards"), "{text}");
}

#[test]
fn a_model_that_no_choice_keeps_is_refused_and_nothing_is_written() {
    let (_guard, dir) = copy("tiny-bert-masked");
    let text = error(&["export", "--precision", "int8", "--max-metric-drop", "0"], &dir, 1);
    assert!(
        text.contains("no choice of matrices that stay in fp32 brings it to --max-metric-drop 0"),
        "{text}"
    );
    assert!(!dir.join("onnx").exists());
}

#[test]
fn fp32_and_int8_stand_beside_each_other_and_each_is_served_where_it_is_asked_for() {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    export(&dir, &["--max-metric-drop", "100"]);
    let logits = |precision: &str| {
        let args = ["serve-batch", "--input", "-", "--logits", "--precision", precision];
        let out = tk().args(args).arg(&dir).write_stdin("{\"text\": \"a good day\"}\n").assert().success();
        let line: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
        let numbers = line["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32);
        numbers.collect::<Vec<_>>()
    };
    let (fp32, int8) = (logits("fp32"), logits("int8"));
    let (apart, _) = common::max_abs(&fp32, &int8);
    assert!(apart > 1e-5 && apart < 1.0, "{fp32:?}, {int8:?}");
    // the weights stand in a file of their own where that is asked for
    export(&dir, &["--max-metric-drop", "100", "--external-data"]);
    assert!(dir.join("onnx/model_quantized.onnx_data").is_file());
    assert_eq!(logits("int8"), int8);
    export(&dir, &["--max-metric-drop", "100"]);
    assert!(!dir.join("onnx/model_quantized.onnx_data").exists());
    // a new export of fp32 forgets nothing
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    let manifest = json(dir.join("onnx/manifest.json"));
    assert_eq!(manifest["precisions"]["int8"]["file"], "model_quantized.onnx");
    // a graph that is changed is found out
    let path = dir.join("onnx/model_quantized.onnx");
    let mut graph = write::load(&path).unwrap();
    for tensor in graph.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
        if tensor.name.ends_with("output.dense.weight_scale") {
            tensor.raw_data = tensor.raw_data.iter().map(|byte| byte ^ 0x40).collect();
        }
    }
    write::save(graph, &path, false).unwrap();
    let text = error(&["parity", "--precision", "int8"], &dir, 1);
    assert!(text.contains("ort-cpu differ from eager"), "{text}");
}

#[test]
fn what_has_no_int8_and_what_is_not_there_are_named() {
    let (_guard, dir) = copy("tiny-gpt2-lm");
    let wanted = "--precision int8: a causal-lm model is exported in fp32, fp16, q8, q4";
    for command in ["export", "serve-batch", "eval", "parity"] {
        let mut args = vec![command, "--precision", "int8"];
        args.extend(match command {
            "export" => &[][..],
            "parity" => &[],
            "eval" => &["--input", "none.jsonl", "--runtime", "onnx"],
            _ => &["--input", "-"],
        });
        let text = error(&args, &dir, 2);
        assert!(
            text.contains(wanted) || text.contains("a language model's graphs in fewer bits"),
            "{command}: {text}"
        );
    }
    let (_guard, dir) = copy("tiny-bert-single");
    let text = error(&["serve-batch", "--input", "-", "--precision", "int8"], &dir, 2);
    assert!(text.contains("model_quantized.onnx is not there: run `tk export"), "{text}");
    assert!(text.contains("--precision int8` first"), "{text}");
    let text = error(&["export", "--precision", "q4"], &dir, 2);
    assert!(
        text.contains("--precision q4: a text-classification model is exported in fp32, fp16, bf16, int8"),
        "{text}"
    );
    assert!(error(&["export", "--max-metric-drop", "1"], &dir, 2).contains("--max-metric-drop is for int8"));
    let text = error(&["export", "--precision", "int8", "--max-perplexity-increase", "1"], &dir, 2);
    assert!(text.contains("--max-perplexity-increase is for q8 and q4"), "{text}");
    for flags in [&["--opset", "20"][..], &["--external-data"]] {
        let lm = models("tiny-gpt2-lm");
        let text = error(&[&["export", "--precision", "q8"], flags].concat(), &lm, 2);
        assert!(text.contains("say nothing to --precision q8"), "{text}");
    }
    let text = error(&["eval", "--precision", "int8", "--input", "none.jsonl"], &dir, 2);
    assert!(text.contains("give --runtime onnx"), "{text}");
}
