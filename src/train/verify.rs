//! The proof that a run which is stopped and resumed equals one which is not: both are made, each part in a process of
//! its own, and every number of their checkpoints is compared.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;

use super::checkpoint::Folder;
use crate::checkpoint::Weights;
use crate::say::Say;
use crate::{Result, bail_unusable, unusable};

/// What was compared.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    /// Steps of each of the two runs.
    pub steps: usize,
    pub tensors: usize,
    pub numbers: usize,
}

/// Trains `steps` steps with these settings, and again with a break after half of them.
///
/// # Errors
/// Unusable: an odd number of steps, or what a run refuses. The first number that differs.
pub fn verify_resume(settings: &toml::Table, steps: usize, say: &Say) -> Result<Verified> {
    if steps < 2 || !steps.is_multiple_of(2) {
        bail_unusable!("--verify-resume {steps}: an even number of steps was expected, 2 at least");
    }
    let scratch = tempfile::Builder::new().prefix("tk-verify-resume-").tempdir()?;
    let config = scratch.path().join("settings.toml");
    std::fs::write(&config, toml::to_string(settings)?).with_context(|| config.display().to_string())?;
    let [straight, broken] = ["straight", "broken"].map(|name| scratch.path().join(name));
    say.line(format!("{steps} steps without a break"));
    train(&["--config".as_ref(), config.as_os_str()], &straight, steps)?;
    say.line(format!("{} steps, and a checkpoint", steps / 2));
    train(&["--config".as_ref(), config.as_os_str()], &broken, steps / 2)?;
    say.line(format!("{} more from it, in another process", steps / 2));
    train(&["--resume".as_ref()], &broken, steps)?;
    let [straight, broken] = [straight, broken].map(|dir| Folder::of(&dir));
    compare(&straight.checkpoint(steps), &broken.checkpoint(steps), steps)
}

/// Runs `tk train` up to a step.
fn train(how: &[&std::ffi::OsStr], output: &Path, steps: usize) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["train", "--quiet"]).args(how).arg("--output").arg(output);
    command.arg("--stop-at").arg(steps.to_string());
    let ended = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        let said = said.trim().trim_start_matches("error: ");
        match ended.status.code() {
            Some(2) => return Err(unusable!("{said}")),
            _ => anyhow::bail!("a run of {steps} steps has failed ({}): {said}", ended.status),
        }
    }
    Ok(())
}

/// Holds every number of two checkpoints against each other.
///
/// # Errors
/// Names the first tensor and place that differs.
fn compare(straight: &Path, broken: &Path, steps: usize) -> Result<Verified> {
    let names = |dir: &Path| -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in dir.read_dir().with_context(|| dir.display().to_string())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    let files = names(straight)?;
    anyhow::ensure!(files == names(broken)?, "the checkpoints consist of different files");
    let (mut tensors, mut numbers) = (0, 0);
    for file in files.iter().filter(|file| file.ends_with(".safetensors")) {
        let [a, b] = [Weights::open_file(&straight.join(file))?, Weights::open_file(&broken.join(file))?];
        anyhow::ensure!(a.names().eq(b.names()), "{file} of the checkpoints has different tensors");
        for name in a.names() {
            let [a, b] = [a.f32(name)?, b.f32(name)?];
            let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
            anyhow::ensure!(a.len() == b.len(), "{file}: {name} has {} and {} numbers", a.len(), b.len());
            if let Some(at) = a.iter().zip(b.iter()).position(differs) {
                let count = a.iter().zip(b.iter()).filter(|&pair| differs(pair)).count();
                anyhow::bail!(
                    "a resumed run is another one: after {steps} steps {name} ({file}) differs in {count} of {} numbers, \
                     first in number {at}: {:e} without a break, {:e} with one",
                    a.len(),
                    a[at],
                    b[at]
                );
            }
            tensors += 1;
            numbers += a.len();
        }
    }
    let progress = |dir: &Path| -> Result<Value> {
        let mut progress: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("progress.json"))?)?;
        progress["seconds"].take();
        Ok(progress)
    };
    let [a, b] = [progress(straight)?, progress(broken)?];
    anyhow::ensure!(
        a == b,
        "a resumed run is another one: after {steps} steps its progress is {b}, expected {a}"
    );
    Ok(Verified { steps, tensors, numbers })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::write_safetensors;

    #[test]
    fn one_bit_anywhere_in_a_checkpoint_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, square: [f32; 2], tokens: u64| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            write_safetensors(&folder.join("model.safetensors"), [("w", &[2][..], &[1.0, 0.0][..])]).unwrap();
            write_safetensors(
                &folder.join("optimizer.safetensors"),
                [("exp_avg_sq.w", &[2][..], &square[..])],
            )
            .unwrap();
            std::fs::write(
                folder.join("progress.json"),
                format!("{{\"seconds\": {tokens}, \"tokens\": {tokens}}}"),
            )
            .unwrap();
            folder
        };
        let a = write("a", [1.0, 0.0], 5);
        let same = compare(&a, &a, 4).unwrap();
        assert_eq!((same.tensors, same.numbers), (2, 4));
        let said = compare(&a, &write("b", [1.0, -0.0], 5), 4).unwrap_err().to_string();
        assert!(said.contains("exp_avg_sq.w") && said.contains("number 1"), "{said}");
        assert!(compare(&a, &write("b", [1.0, 0.0], 6), 4).unwrap_err().to_string().contains("progress"));
        std::fs::write(dir.path().join("b/ema.safetensors"), "").unwrap();
        assert!(compare(&a, &dir.path().join("b"), 4).unwrap_err().to_string().contains("different files"));
    }
}
