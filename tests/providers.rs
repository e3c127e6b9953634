//! Execution providers: what is asked of them and can't be had is refused by name; the real binary.

mod common;

use common::{copy, json, models, tk};

/// What a command on an exported model says, which ends with exit code 2.
fn refused(args: &[&str]) -> String {
    let (_guard, dir) = copy("tiny-bert-single");
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    let out = tk().args(args).arg(&dir).assert().code(2);
    String::from_utf8_lossy(&out.get_output().stderr).into_owned()
}

#[test]
fn a_flag_that_is_not_the_providers_is_refused() {
    for (flags, wanted) in [
        (&["--device-id", "1"][..], "--device-id is for cuda and tensorrt: name it in --ep"),
        (&["--gpu-memory-mb", "100", "--ep", "cpu"], "--gpu-memory-mb is for cuda and tensorrt"),
        (&["--tf32", "--ep", "openvino"], "--tf32 is for cuda and tensorrt"),
        (&["--ep-cache", "cache", "--ep", "cuda"], "--ep-cache is for openvino and tensorrt"),
        (&["--precision", "bf16"], "--precision bf16 is computed by OpenVINO: give --ep openvino"),
        (&["--precision", "bf16", "--ep", "openvino,cpu"], "give --ep openvino, and no other beside it"),
    ] {
        let text = refused(&[&["serve-batch", "--input", "-"], flags].concat());
        assert!(text.contains(wanted), "{flags:?}: {text}");
        let text = refused(&[&["serve", "--listen", "127.0.0.1:0"], flags].concat());
        assert!(text.contains(wanted), "{flags:?}: {text}");
    }
    // nor is it passed over where texts are generated
    let args = ["serve-batch", "--input", "-", "--device-id", "1"];
    let out = tk().args(args).arg(models("tiny-gpt2-lm")).assert().code(2);
    let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(text.contains("--device-id is for cuda and tensorrt"), "{text}");
    for (args, wanted) in [
        (
            &["export", "--precision", "bf16"][..],
            "--precision bf16 is computed by OpenVINO: give --ep openvino",
        ),
        (&["export", "--ep", "openvino"], "--ep openvino: of its own a provider has"),
        (&["export", "--precision", "int8", "--ep", "cuda"], "--ep cuda: of its own a provider has"),
        (&["parity", "--precision", "bf16", "--runtimes", "eager,ort-cpu"], "held against eager"),
    ] {
        let text = refused(args);
        assert!(text.contains(wanted), "{args:?}: {text}");
    }
}

#[test]
fn a_provider_that_the_library_lacks_is_named_with_the_remedy() {
    for (provider, remedy) in [
        ("openvino", "run ./scripts/setup --openvino, or set ORT_DYLIB_PATH to a build that has it"),
        ("cuda", "onnxruntime-gpu"),
        ("tensorrt", "onnxruntime-gpu"),
    ] {
        // the plain build, wherever another one may lie
        let library = tk::runtime::library::library().unwrap();
        let (_guard, dir) = copy("tiny-bert-single");
        tk().args(["export", "--quiet"]).arg(&dir).assert().success();
        let args = ["serve-batch", "--input", "-", "--ep", provider];
        let out = tk().args(args).arg(&dir).env("ORT_DYLIB_PATH", &library.path).assert().code(2);
        let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(text.contains("is built without") && text.contains(remedy), "{provider}: {text}");
    }
}

#[test]
fn the_graph_that_cuda_runs_is_written_where_it_is_asked_for_and_goes_with_the_next_export() {
    let (_guard, dir) = copy("tiny-bert-single");
    let export = |args: &[&str]| tk().args(["export", "--quiet"]).args(args).arg(&dir).assert().success();
    let optimized = dir.join("onnx/model_optimized.onnx");
    export(&["--ep", "cuda", "--external-data"]);
    let manifest = json(dir.join("onnx/manifest.json"));
    assert_eq!(manifest["optimized"]["cuda"]["file"], "model_optimized.onnx");
    assert_eq!(manifest["optimized"]["cuda"]["weights_sha256"], manifest["weights_sha256"]);
    // its weights are model.onnx's
    assert!(std::fs::metadata(&optimized).unwrap().len() < 40_000);

    export(&[]);
    assert!(!optimized.exists());
    assert!(json(dir.join("onnx/manifest.json"))["optimized"].is_null());
    let out = tk().args(["export", "--ep", "cuda"]).arg(models("tiny-deberta-v2-single")).assert().code(2);
    let text = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(text.contains("no operator of ONNX Runtime's own computes this model's attention"), "{text}");
}
