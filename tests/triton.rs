//! `tk export --triton`: a model repository that holds the exported graph, and a config.pbtxt that says what it is.

mod common;

use std::path::{Path, PathBuf};

use common::{LANGUAGE_MODEL, copy_dir, models, tk};
use tk::onnx::{dump, write};

struct Bench(tempfile::TempDir);

impl Bench {
    fn new(model: &str) -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        copy_dir(&models(model), &bench.path("sst2"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn export(&self, args: &[&str]) -> assert_cmd::assert::Assert {
        tk().args(["export", "--triton"])
            .arg(self.path("repository"))
            .arg(self.path("sst2"))
            .args(args)
            .assert()
    }

    fn config(&self, name: &str) -> String {
        std::fs::read_to_string(self.path("repository").join(name).join("config.pbtxt")).unwrap()
    }

    fn refused(&self, args: &[&str], wanted: &str) {
        let out = self.export(args).code(2);
        let error = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(error.contains(wanted), "{args:?}: {wanted} is not in {error}");
        assert!(!self.path("repository").exists() && !self.path("sst2/onnx").exists(), "{args:?}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_graph_stands_there_and_its_values_are_declared() {
    let bench = Bench::new("tiny-bert-single");
    let out = bench.export(&["--json", "--triton-tensorrt", "fp16"]).success();
    let result: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(result["triton"], bench.path("repository/sst2").to_str().unwrap());
    let model = bench.path("repository/sst2");
    assert_eq!(
        (names(&model), names(&model.join("1"))),
        (vec!["1".into(), "config.pbtxt".into()], vec!["model.onnx".into()])
    );
    let exported = std::fs::read(bench.path("sst2/onnx/model.onnx")).unwrap();
    assert!(std::fs::read(model.join("1/model.onnx")).unwrap() == exported);
    insta::assert_snapshot!("tiny-bert-single-tensorrt-fp16", bench.config("sst2"));
}

#[test]
fn a_language_model_stands_there_with_its_past() {
    let bench = Bench::new(LANGUAGE_MODEL);
    bench.export(&["--triton-name", "writer"]).success();
    // again, over what stands there
    bench.export(&["--triton-name", "writer"]).success();
    let model = bench.path("repository/writer/1");
    assert_eq!(names(&model), ["model.onnx", "model.onnx_data"]);
    let (there, exported) = (model.join("model.onnx"), bench.path("sst2/onnx/model.onnx"));
    assert!(write::load(&there).unwrap() == write::load(&exported).unwrap());
    insta::assert_snapshot!("tiny-gpt2-lm", bench.config("writer"));
}

#[test]
fn a_precision_is_that_of_its_graph_and_keeps_its_weights() {
    let bench = Bench::new("tiny-bert-tokens");
    let args = ["--precision", "int8", "--max-metric-drop", "100", "--external-data"];
    bench.export(&args).success();
    let model = bench.path("repository/sst2/1");
    assert_eq!(names(&model), ["model.onnx", "model.onnx_data"], "a server looks for this name");
    let there = write::load(&model.join("model.onnx")).unwrap();
    let exported = write::load(&bench.path("sst2/onnx/model_quantized.onnx")).unwrap();
    assert_eq!(dump::dump(&there), dump::dump(&exported));
    let config = bench.config("sst2");
    assert!(config.contains("dims: [ -1, 5 ]") && config.contains("kind: KIND_CPU"), "{config}");
    bench.export(&args[..4]).success();
    assert_eq!(names(&model), ["model.onnx"], "weights that nothing asks for are gone");
}

#[test]
fn what_triton_can_not_serve_is_refused_by_name() {
    let bench = Bench::new("tiny-bert-single");
    bench.refused(&["--triton-name", "a/b"], "\"a/b\" can't be a model's name");
    bench.refused(&["--triton-name", ".."], "\"..\" can't be a model's name");
    bench.refused(&["--precision", "int8", "--triton-tensorrt", "fp32"], "signed bytes around zero");
    let bench = Bench::new(LANGUAGE_MODEL);
    bench.refused(&["--triton-tensorrt", "fp32"], "grows with every token");
    bench.refused(&["--precision", "q8"], "one that tk alone generates with");
    let alone = tk().arg("export").arg(bench.path("sst2")).args(["--triton-name", "x"]).assert().code(2);
    assert!(String::from_utf8_lossy(&alone.get_output().stderr).contains("--triton <DIR>"));
}
