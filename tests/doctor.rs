//! `tk doctor` and the search for ONNX Runtime's library, the real binary.

mod common;

use common::{models, tk};
use serde_json::Value;

fn doctor(library: Option<&str>) -> (i32, Value) {
    let mut command = tk();
    command.args(["doctor", "--json"]);
    match library {
        Some(path) => command.env("ORT_DYLIB_PATH", path),
        None => command.env_remove("ORT_DYLIB_PATH"),
    };
    let out = command.output().unwrap();
    (out.status.code().unwrap(), serde_json::from_slice(&out.stdout).unwrap())
}

#[test]
fn the_library_is_found_without_help_and_the_cpu_computes() {
    let (code, report) = doctor(None);
    assert_eq!(code, 0, "{report}");
    let runtime = &report["onnxruntime"];
    assert!(runtime["path"].as_str().unwrap().contains("libonnxruntime"), "{runtime}");
    assert!(runtime["version"].as_str().unwrap().starts_with("1."), "{runtime}");
    let providers = report["providers"].as_array().unwrap();
    assert_eq!((&providers[0]["name"], &providers[0]["works"]), (&"cpu".into(), &true.into()));
    for provider in providers.iter().filter(|provider| provider["works"] == false) {
        assert!(!provider["reason"].as_str().unwrap().is_empty());
    }
    assert!(report["cpu"]["threads"].as_u64().unwrap() >= 1);
}

#[test]
fn a_library_that_is_missing_or_no_library_is_named() {
    let text = models("tiny-bert-single").join("vocab.txt");
    for (path, wanted) in
        [("/absent/libonnxruntime.so", "there is no such file"), (text.to_str().unwrap(), "can't be loaded")]
    {
        let (code, report) = doctor(Some(path));
        assert_eq!(code, 1);
        let error = report["onnxruntime"]["error"].as_str().unwrap();
        assert!(error.contains(path) && error.contains(wanted), "{error}");
    }
}

/// A library that says it is ONNX Runtime 1.16.3, which is older than tk needs.
#[cfg(target_os = "linux")]
#[test]
fn a_library_that_is_too_old_is_named_with_both_versions() {
    const SOURCE: &str = r#"
        static const char *version(void) { return "1.16.3"; }
        static const void *api(unsigned v) { return 0; }
        static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base = {api, version};
        const void *OrtGetApiBase(void) { return &base; }
    "#;
    let dir = tempfile::tempdir().unwrap();
    let (source, library) = (dir.path().join("old.c"), dir.path().join("libonnxruntime.so"));
    std::fs::write(&source, SOURCE).unwrap();
    // the linker that built this test
    let cc =
        std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    assert!(cc.unwrap().success());
    let path = library.to_str().unwrap();
    let (code, report) = doctor(Some(path));
    assert_eq!(code, 1);
    let error = report["onnxruntime"]["error"].as_str().unwrap();
    assert!(error.contains("is ONNX Runtime 1.16.3; tk needs 1.24 or newer"), "{error}");

    let model = models("tiny-bert-single");
    let out = tk().arg("export").arg(&model).env("ORT_DYLIB_PATH", path).assert().code(2);
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("1.16.3"));
}
