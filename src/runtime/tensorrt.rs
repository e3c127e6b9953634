//! What TensorRT is told of a model before it builds an engine of it: the shapes that will come, and where engines are kept.

use std::path::{Path, PathBuf};

use ort::ep;
use sha2::{Digest, Sha256};

use crate::checkpoint;

/// Sequences of a batch at most: an engine plans its memory for the most sequences of the longest length.
pub const MOST_ROWS: usize = 64;

/// The batch that an engine is made fastest for.
const USUAL: (usize, usize) = (32, 128);

/// A model's engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    /// The names of the graph's inputs, all (sequences, tokens).
    pub inputs: Vec<String>,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Whether the graph is in fp16.
    pub fp16: bool,
    /// The hash of the weights. ONNX Runtime's own names of engines do not depend on them: another model of the same
    /// architecture would be answered by the first one's engine.
    pub weights_sha256: String,
}

impl Engine {
    /// The shapes of every input, as TensorRT's profiles have them: `input_ids:1x1,attention_mask:1x1`.
    fn profile(&self, (rows, tokens): (usize, usize)) -> String {
        let (rows, tokens) = (rows.min(MOST_ROWS), tokens.min(self.longest));
        let shapes: Vec<String> =
            self.inputs.iter().map(|input| format!("{input}:{rows}x{tokens}")).collect();
        shapes.join(",")
    }

    /// The smallest, the usual and the largest batch.
    fn profiles(&self) -> [String; 3] {
        [(1, 1), USUAL, (MOST_ROWS, self.longest)].map(|shape| self.profile(shape))
    }

    /// Where this model's engines are kept inside a cache: a folder for each model and each way to build it. The GPU and
    /// TensorRT's version are in the names that ONNX Runtime gives them there.
    fn folder(&self, cache: &Path, minor: u32) -> PathBuf {
        let [least, usual, most] = self.profiles();
        let all = format!("{} {} 1.{minor} {least} {usual} {most}", self.weights_sha256, self.fp16);
        cache.join(&checkpoint::hex(&Sha256::digest(all))[..24])
    }

    /// The options of a session with this engine.
    pub(super) fn options(
        &self,
        mut options: ep::TensorRT,
        cache: Option<&Path>,
        minor: u32,
    ) -> ep::TensorRT {
        let [least, usual, most] = self.profiles();
        options = options
            .with_profile_min_shapes(least)
            .with_profile_opt_shapes(usual)
            .with_profile_max_shapes(most)
            .with_fp16(self.fp16)
            .with_layer_norm_fp32_fallback(self.fp16);
        if let Some(cache) = cache {
            let folder = self.folder(cache, minor);
            options = options
                .with_engine_cache(true)
                .with_engine_cache_path(folder.display())
                // what was learnt of kernels holds for every model
                .with_timing_cache(true)
                .with_timing_cache_path(cache.display());
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine() -> Engine {
        let inputs = ["input_ids", "attention_mask"].map(str::to_owned).to_vec();
        Engine { inputs, longest: 512, fp16: false, weights_sha256: "ab".to_owned() }
    }

    #[test]
    fn every_input_has_a_shape_in_every_profile() {
        assert_eq!(
            engine().profiles(),
            [
                "input_ids:1x1,attention_mask:1x1",
                "input_ids:32x128,attention_mask:32x128",
                "input_ids:64x512,attention_mask:64x512"
            ]
        );
        // no profile is outside the largest one
        assert_eq!(Engine { longest: 64, ..engine() }.profiles()[1], "input_ids:32x64,attention_mask:32x64");
    }

    #[test]
    fn engines_of_other_weights_and_other_shapes_lie_elsewhere() {
        let folder = |engine: Engine| engine.folder(Path::new("/cache"), 31);
        let own = folder(engine());
        assert_eq!(own, folder(engine()));
        assert!(own.starts_with("/cache"));
        for other in [
            Engine { weights_sha256: "cd".to_owned(), ..engine() },
            Engine { fp16: true, ..engine() },
            Engine { longest: 128, ..engine() },
            Engine { inputs: vec!["input_ids".to_owned()], ..engine() },
        ] {
            assert_ne!(own, folder(other));
        }
        assert_ne!(own, engine().folder(Path::new("/cache"), 32));
    }

    #[test]
    fn a_session_is_told_all_of_it() {
        let options =
            Engine { fp16: true, ..engine() }.options(ep::TensorRT::default(), Some(Path::new("/cache")), 31);
        let told = format!("{options:?}");
        for key in [
            "trt_profile_min_shapes",
            "trt_profile_opt_shapes",
            "trt_profile_max_shapes",
            "trt_fp16_enable",
            "trt_layer_norm_fp32_fallback",
            "trt_engine_cache_path",
            "trt_timing_cache_path",
        ] {
            assert!(told.contains(key), "{key}: {told}");
        }
        let told = format!("{:?}", engine().options(ep::TensorRT::default(), None, 31));
        assert!(!told.contains("cache"), "{told}");
    }
}
