//! Execution providers: what is asked of them and can't be had is refused by name; the real binary.

mod common;

use common::{copy, tk};

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
    for (args, wanted) in [
        (
            &["export", "--precision", "bf16"][..],
            "--precision bf16 is computed by OpenVINO: give --ep openvino",
        ),
        (&["export", "--ep", "openvino"], "--ep is for --precision bf16"),
        (&["export", "--precision", "int8", "--ep", "openvino"], "--ep is for --precision bf16"),
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
