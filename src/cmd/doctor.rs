//! `tk doctor`: this machine → what of it tk can use, and why not the rest.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::Result;
use crate::eager::kernels::gemm::bf16;
use crate::process;
use crate::runtime::{Provider, library, probe};
use crate::say::Say;

/// Tell what this machine has: ONNX Runtime, execution providers and why one is missing, GPU, CPU, memory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Try one provider and print what came of it, for the doctor that started this one.
    #[arg(long, value_name = "PROVIDER", hide = true)]
    probe: Option<Provider>,
}

/// Looks at everything and prints it; fails where ONNX Runtime can't be used.
pub fn run(args: &Args, say: Say) -> Result<()> {
    if let Some(provider) = args.probe {
        let found = tried(provider);
        return say.result(found.to_string(), &found);
    }
    let runtime = runtime();
    let providers: Vec<Value> = Provider::ALL.into_iter().map(provider).collect();
    let works = providers.iter().any(|provider| provider["works"] == true);
    let report = json!({
        "tk_version": env!("CARGO_PKG_VERSION"),
        "onnxruntime": runtime,
        "providers": providers,
        "nvidia": nvidia(),
        "cpu": cpu(),
        "memory_bytes": memory_bytes(),
        "usable": works,
    });
    say.result(human(&report), &report)?;
    if !works {
        anyhow::bail!("ONNX Runtime can't be used: nothing can be exported or served");
    }
    Ok(())
}

fn runtime() -> Value {
    match library::library() {
        Ok(library) => json!({
            "path": library.path,
            "version": format!("1.{}", library.minor),
            "found": library.found,
            "build": library::build_info().unwrap_or_default(),
        }),
        Err(error) => {
            json!({"error": format!("{error:#}"), "oldest": format!("1.{}", library::OLDEST_MINOR)})
        }
    }
}

/// What can be told of a provider. Another process tries it: a process loads one build of ONNX Runtime, OpenVINO has its
/// own, and a driver that crashes must not take the doctor with it.
fn provider(provider: Provider) -> Value {
    if provider == Provider::Cpu {
        return tried(provider);
    }
    let name = provider.name();
    let ended = std::env::current_exe()
        .and_then(|tk| Command::new(tk).args(["doctor", "--probe", name, "--json"]).output());
    let reason = match ended {
        Ok(ended) => match serde_json::from_slice(&ended.stdout) {
            Ok(found) => return found,
            Err(_) => format!("its test ended with {}", ended.status),
        },
        Err(error) => format!("its test could not be started: {error}"),
    };
    json!({"name": name, "works": false, "reason": reason})
}

/// Tries a provider on a matrix product of known result.
fn tried(provider: Provider) -> Value {
    if provider == Provider::OpenVino {
        library::prefer_openvino();
    }
    let compiled_in = provider.compiled_in().unwrap_or(false);
    let works = library::library()
        .map_err(|_| anyhow::anyhow!("ONNX Runtime is missing"))
        .and_then(|_| probe::probe(provider));
    match works {
        Ok(()) => json!({
            "name": provider.name(),
            "compiled_in": compiled_in,
            "works": true,
            "library": library::library().ok().map(|library| &library.path),
        }),
        Err(why) => json!({
            "name": provider.name(),
            "compiled_in": compiled_in,
            "works": false,
            "reason": format!("{why:#}"),
        }),
    }
}

/// The driver and the GPUs, where there are any.
fn nvidia() -> Value {
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = driver.as_deref().and_then(|text| text.lines().next());
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
    let listed = Command::new("nvidia-smi").args(query).output().ok().filter(|out| out.status.success());
    let gpus = listed.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    let gpus: Vec<String> = gpus.iter().flat_map(|text| text.lines().map(str::to_owned)).collect();
    json!({"driver": driver, "gpus": gpus, "candle_cuda": candle_core::utils::cuda_is_available()})
}

fn cpu() -> Value {
    let threads = process::cores();
    let bf16 = bf16::unit().map(bf16::Unit::name);
    json!({"model": process::cpu_model(), "threads": threads, "features": features(), "bf16_training": bf16})
}

/// What the kernels here and in ONNX Runtime choose their code by.
fn features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avxvnni", is_x86_feature_detected!("avxvnni")),
        ]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        [
            ("neon", std::arch::is_aarch64_feature_detected!("neon")),
            ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ]
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

/// The machine's memory, where the system tells.
fn memory_bytes() -> Option<u64> {
    let text = process::field(Path::new("/proc/meminfo"), "MemTotal")?;
    Some(text.trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

fn human(report: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "none".to_owned(),
        other => other.to_string(),
    };
    let list = |value: &Value| {
        let items: Vec<String> = value.as_array().into_iter().flatten().map(text).collect();
        if items.is_empty() { "none".to_owned() } else { items.join(", ") }
    };
    let mut out = String::new();
    // writing to a String can't fail
    let _ = writeln!(out, "tk            {}", text(&report["tk_version"]));
    let runtime = &report["onnxruntime"];
    let _ = match runtime["error"].as_str() {
        Some(error) => writeln!(out, "ONNX Runtime  missing: {error}"),
        None => writeln!(
            out,
            "ONNX Runtime  {} ({}), {}\n              {}",
            text(&runtime["version"]),
            text(&runtime["found"]),
            text(&runtime["path"]),
            text(&runtime["build"])
        ),
    };
    for provider in report["providers"].as_array().into_iter().flatten() {
        let verdict =
            provider["reason"].as_str().map_or("works".to_owned(), |reason| format!("missing: {reason}"));
        let _ = writeln!(out, "  {:<12}{verdict}", text(&provider["name"]));
    }
    let nvidia = &report["nvidia"];
    let _ =
        writeln!(out, "NVIDIA        driver: {}; GPUs: {}", text(&nvidia["driver"]), list(&nvidia["gpus"]));
    let candle = if nvidia["candle_cuda"] == true { "yes" } else { "no (cargo build --features cuda)" };
    let _ = writeln!(out, "  candle's CUDA built in: {candle}");
    let cpu = &report["cpu"];
    let _ = writeln!(
        out,
        "CPU           {}; {} threads; {}",
        text(&cpu["model"]),
        text(&cpu["threads"]),
        list(&cpu["features"])
    );
    let bf16 =
        cpu["bf16_training"].as_str().map_or("no (neither AMX-BF16 nor AVX512-BF16)".to_owned(), |unit| {
            format!("yes, by {unit} (tk train --precision bf16)")
        });
    let _ = writeln!(out, "  training in bf16: {bf16}");
    let memory = report["memory_bytes"].as_u64().map(|bytes| format!("{:.1} GB", bytes as f64 / 1e9));
    let _ = write!(out, "memory        {}", memory.unwrap_or_else(|| "unknown".to_owned()));
    out
}
