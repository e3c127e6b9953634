//! What a provider lacks on this machine: ONNX Runtime's message → the package that carries the library.

use super::Provider;

/// Shared libraries by the beginning of their names, and the packages of PyPI that carry them.
const CARRIED_BY: [(&str, &str); 10] = [
    ("libcublas", "nvidia-cublas"),
    ("libcuda.so", "NVIDIA's driver"),
    ("libcudart", "nvidia-cuda-runtime"),
    ("libcudnn", "nvidia-cudnn-cu13"),
    ("libcurand", "nvidia-curand"),
    ("libcufft", "nvidia-cufft"),
    ("libnvrtc", "nvidia-cuda-nvrtc"),
    ("libnvinfer", "tensorrt-cu13 10.x, from NVIDIA's index"),
    ("libnvonnxparser", "tensorrt-cu13 10.x, from NVIDIA's index"),
    ("libopenvino", "onnxruntime-openvino"),
];

/// What to do where a provider can't be registered.
pub(super) fn remedy(provider: Provider, message: &str) -> String {
    // the provider's own library is named in front of it
    let missing = message.split_once(": cannot open shared object file").map(|(before, _)| before);
    let missing = missing.and_then(|before| before.rsplit([' ', ':', '\n']).next()).unwrap_or_default();
    let carrier = CARRIED_BY.iter().find(|(library, _)| missing.starts_with(library));
    match (carrier, provider) {
        (Some((_, package)), _) => {
            format!("; {missing} is missing ({package}): put it on the loader's path (LD_LIBRARY_PATH)")
        }
        (None, Provider::Cpu | Provider::OpenVino) => String::new(),
        (None, Provider::Cuda | Provider::TensorRt) => {
            "; it needs NVIDIA's driver and its libraries on the loader's path (LD_LIBRARY_PATH)".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_missing_library_is_named_with_its_package() {
        let message = "Failed to load library /x/libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot \
                       open shared object file: No such file or directory";
        let remedy = remedy(Provider::Cuda, message);
        assert!(remedy.contains("libcublasLt.so.13 is missing (nvidia-cublas)"), "{remedy}");
    }

    #[test]
    fn other_messages_say_what_the_provider_needs() {
        assert!(remedy(Provider::TensorRt, "no CUDA-capable device").contains("driver"));
        assert_eq!(remedy(Provider::Cpu, "out of memory"), "");
    }
}
