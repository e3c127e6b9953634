//! `tk export`, the real binary on the tiny models: what it writes is verified, whole, and always the same.

mod common;

use std::path::Path;

use common::{copy, json, predictors, tk};
use tk::checkpoint::{Weights, write_safetensors};
use tk::onnx::write;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Rewrites the weights of a model directory.
fn change_weights(dir: &Path, change: impl Fn(&str, &mut Vec<f32>)) {
    let names = tk::model::ModelConfig::read(dir).unwrap().family.names();
    let weights = Weights::open(dir, names).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .names()
        .map(|name| {
            let mut values = weights.f32(name).unwrap().to_vec();
            change(name, &mut values);
            (name.to_owned(), weights.shape(name).unwrap().to_vec(), values)
        })
        .collect();
    let views = tensors.iter().map(|(n, shape, values)| (n.as_str(), shape.as_slice(), values.as_slice()));
    write_safetensors(&dir.join("model.safetensors"), views).unwrap();
}

#[test]
fn an_export_is_verified_and_says_what_it_is() {
    for model in predictors() {
        let (_guard, dir) = copy(model);
        let mut expected = names(&dir);
        let out = tk().args(["export", "--json"]).arg(&dir).assert().success();
        let result: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
        assert!(result["max_abs"].as_f64().unwrap() < 1e-5, "{result}");
        assert!(result["records"].as_u64().unwrap() > 40);

        let manifest = json(dir.join("onnx/manifest.json"));
        let file = dir.join("onnx/model.onnx");
        assert_eq!(manifest["sha256"], tk::checkpoint::file_hash(&file).unwrap());
        assert_eq!((manifest["opset"].as_i64(), manifest["precision"].as_str()), (Some(18), Some("fp32")));
        assert_eq!(manifest["weights_sha256"], write::metadata(&file).unwrap()["weights_sha256"]);

        // nothing else is there
        assert_eq!(names(&dir.join("onnx")), ["manifest.json", "model.onnx"]);
        expected.push("onnx".to_owned());
        expected.sort();
        assert_eq!(names(&dir), expected);
    }
}

#[test]
fn the_same_model_is_exported_to_the_same_bytes() {
    let ((_a, a), (_b, b)) = (copy("tiny-bert-multi"), copy("tiny-bert-multi"));
    for dir in [&a, &b] {
        tk().arg("export").arg(dir).assert().success();
    }
    for file in ["onnx/model.onnx", "onnx/manifest.json"] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn external_weights_come_and_go_with_the_flag() {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--external-data", "--opset", "14"]).arg(&dir).assert().success();
    assert_eq!(names(&dir.join("onnx")), ["manifest.json", "model.onnx", "model.onnx_data"]);
    let manifest = json(dir.join("onnx/manifest.json"));
    let data = tk::checkpoint::file_hash(&dir.join("onnx/model.onnx_data")).unwrap();
    assert_eq!(
        (manifest["opset"].as_i64(), manifest["data_sha256"].as_str()),
        (Some(14), Some(data.as_str()))
    );
    tk().arg("export").arg(&dir).assert().success();
    assert_eq!(names(&dir.join("onnx")), ["manifest.json", "model.onnx"]);
}

#[test]
fn a_graph_whose_logits_are_not_finite_is_not_left_behind_and_an_older_one_stays() {
    let (_guard, dir) = copy("tiny-bert-single");
    change_weights(&dir, |name, values| {
        if name == "classifier.weight" {
            values.fill(f32::MAX);
        }
    });
    let out = tk().arg("export").arg(&dir).assert().code(1);
    let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(text.contains("does not give the trained model's logits"), "{text}");
    assert!(!dir.join("onnx").exists());
    assert!(names(&dir).iter().all(|name| !name.starts_with(".tk")), "{:?}", names(&dir));

    std::fs::create_dir(dir.join("onnx")).unwrap();
    std::fs::write(dir.join("onnx/model.onnx"), "older").unwrap();
    tk().arg("export").arg(&dir).assert().code(1);
    assert_eq!(std::fs::read_to_string(dir.join("onnx/model.onnx")).unwrap(), "older");
}

#[test]
fn what_cannot_be_used_is_named_and_nothing_is_written() {
    let refused = |dir: &Path, args: &[&str], wanted: &str| {
        let before = names(dir);
        let out = tk().arg("export").arg(dir).args(args).assert().code(2);
        let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(text.contains(wanted), "{wanted} is not in {text}");
        assert_eq!(names(dir), before);
    };
    let (_guard, dir) = copy("tiny-bert-single");
    refused(&dir, &["--opset", "12"], "opset 12: tk writes the opsets 13 to 24");
    refused(&dir, &["--precision", "int4"], "int4");
    std::fs::write(dir.join("onnx"), "a file").unwrap();
    refused(&dir, &[], "is no directory, and the graph belongs there");
    std::fs::remove_file(dir.join("onnx")).unwrap();

    let weights = std::fs::read(dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    refused(&dir, &[], "not a whole safetensors file");
    std::fs::write(dir.join("model.safetensors"), &weights).unwrap();
    change_weights(&dir, |name, values| {
        if name == "classifier.bias" {
            values[0] = f32::NAN;
        }
    });
    refused(&dir, &[], "classifier.bias");
}

#[test]
fn without_a_library_to_verify_with_nothing_is_written() {
    let (_guard, dir) = copy("tiny-bert-single");
    let out = tk().arg("export").arg(&dir).env("ORT_DYLIB_PATH", "/absent/lib.so").assert().code(2);
    let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(text.contains("ORT_DYLIB_PATH is /absent/lib.so"), "{text}");
    assert!(!dir.join("onnx").exists());
}

#[test]
fn a_manifest_that_is_none_is_refused_and_stays() {
    let (_guard, dir) = copy("tiny-bert-single");
    std::fs::create_dir(dir.join("onnx")).unwrap();
    for text in ["[]", "{", "{\"generate\": 3}"] {
        std::fs::write(dir.join("onnx/manifest.json"), text).unwrap();
        let out = tk().arg("export").arg(&dir).assert().code(2);
        let said = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(said.contains("manifest.json") && said.contains("delete it"), "{said}");
        assert_eq!(names(&dir.join("onnx")), ["manifest.json"]);
        assert_eq!(std::fs::read_to_string(dir.join("onnx/manifest.json")).unwrap(), text);
    }
}

#[test]
fn the_manifest_keeps_what_it_says_of_files_that_stay() {
    let (_guard, dir) = copy("tiny-gpt2-lm");
    let export = |args: &[&str]| {
        tk().arg("export").arg(&dir).args(args).assert().success();
    };
    export(&["--precision", "q8", "--block-size", "32", "--max-perplexity-increase", "9"]);
    let wanted = json(dir.join("onnx/manifest.json"))["generate"]["q8"].clone();
    assert!(wanted["sha256"].is_string());
    for _ in 0..2 {
        export(&[]);
        let manifest = json(dir.join("onnx/manifest.json"));
        assert_eq!(manifest["generate"]["q8"], wanted);
        assert_eq!(manifest["generate"]["fp32"]["file"], "generate.onnx");
    }
    std::fs::remove_file(dir.join("onnx/generate_q8.onnx")).unwrap();
    export(&[]);
    assert!(json(dir.join("onnx/manifest.json"))["generate"]["q8"].is_null());
}

#[test]
#[cfg(unix)]
fn the_folder_of_graphs_may_stand_on_another_file_system() {
    let elsewhere = ["/dev/shm", "/tmp"].iter().map(Path::new).find(|folder| folder.is_dir()).unwrap();
    let far = tempfile::tempdir_in(elsewhere).unwrap();
    let (_guard, dir) = copy("tiny-bert-single");
    let before = names(&dir);
    std::os::unix::fs::symlink(far.path().join("not/there/yet"), dir.join("onnx")).unwrap();
    for _ in 0..2 {
        tk().args(["export", "--external-data"]).arg(&dir).assert().success();
        assert!(dir.join("onnx").is_symlink());
        assert_eq!(
            names(&far.path().join("not/there/yet")),
            ["manifest.json", "model.onnx", "model.onnx_data"]
        );
    }
    tk().arg("parity").arg(&dir).args(["--runtimes", "eager,ort-cpu"]).assert().success();
    assert_eq!(names(&dir).len(), before.len() + 1);
}

#[test]
#[cfg(unix)]
fn a_full_disk_leaves_the_graphs_as_they_were() {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--external-data"]).arg(&dir).assert().success();
    let files = || -> Vec<Vec<u8>> {
        names(&dir.join("onnx"))
            .iter()
            .map(|name| std::fs::read(dir.join("onnx").join(name)).unwrap())
            .collect()
    };
    let before = files();
    change_weights(&dir, |name, values| {
        if name == "classifier.bias" {
            values[0] += 1.0;
        }
    });
    for more in ["", "--external-data"] {
        // no file may be longer than 64 blocks
        let script = format!("trap '' XFSZ; ulimit -f 64; exec \"$0\" export \"$1\" {more}");
        let out = assert_cmd::Command::new("sh")
            .args(["-c", &script])
            .arg(assert_cmd::cargo::cargo_bin!("tk"))
            .arg(&dir)
            .assert()
            .code(1);
        let said = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(said.contains("too large"), "{said}");
        assert!(files() == before);
    }
}

#[test]
fn two_exports_at_once_leave_one_whole_set_of_graphs() {
    let (_guard, dir) = copy("tiny-gpt2-lm");
    let start = || {
        std::process::Command::new(assert_cmd::cargo::cargo_bin!("tk"))
            .arg("export")
            .arg(&dir)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    for mut run in [start(), start(), start()] {
        assert!(run.wait().unwrap().success());
    }
    let onnx = dir.join("onnx");
    assert_eq!(names(&onnx), ["generate.onnx", "manifest.json", "model.onnx", "model.onnx_data"]);
    let manifest = json(onnx.join("manifest.json"));
    for (file, hash) in [("model.onnx", &manifest["sha256"]), ("model.onnx_data", &manifest["data_sha256"])] {
        assert_eq!(*hash, tk::checkpoint::file_hash(&onnx.join(file)).unwrap());
    }
    for file in ["model.onnx", "generate.onnx"] {
        write::load(&onnx.join(file)).unwrap();
    }
}

#[test]
#[cfg(unix)]
fn a_report_goes_where_its_name_leads() {
    let (guard, dir) = copy("tiny-bert-single");
    tk().arg("export").arg(&dir).assert().success();
    let parity = |report: &Path| {
        let out = tk()
            .arg("parity")
            .arg(&dir)
            .args(["--runtimes", "eager,ort-cpu", "--report"])
            .arg(report)
            .assert()
            .success();
        String::from_utf8_lossy(&out.get_output().stdout).into_owned()
    };
    let link = guard.path().join("link.html");
    std::os::unix::fs::symlink("report.html", &link).unwrap();
    parity(&link);
    assert!(link.is_symlink());
    let page = std::fs::read_to_string(guard.path().join("report.html")).unwrap();
    assert!(page.starts_with("<!doctype html>"));
    assert!(parity(Path::new("/dev/stdout")).starts_with("<!doctype html>"));
}
