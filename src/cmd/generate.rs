//! `tk generate`: a prompt → text, as it arrives.

use std::path::PathBuf;

use serde_json::json;

use super::generation::Flags;
use crate::generate::{Engine, Request};
use crate::onnx::Precision;
use crate::runtime::Slots;
use crate::saved::Saved;
use crate::say::{self, Say};
use crate::serve::served;
use crate::{Result, bail_unusable};

/// Go on with a prompt, through ONNX Runtime, on standard output.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The language model's directory, exported by `tk export`.
    dir: PathBuf,
    /// What the text goes on from.
    #[arg(default_value = "")]
    prompt: String,
    /// Which of the exported graphs.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Threads that compute [default: the cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    #[command(flatten)]
    generation: Flags,
}

/// Writes the text as it arrives; several texts one after another, each when it is whole.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let (settings, limits) = (args.generation.settings()?, args.generation.limits()?);
    let saved = Saved::open(&args.dir)?;
    let end = saved.task.causal_lm("generate")?.end;
    let model = served::checked_generating(&saved, args.precision)?;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let slots = Slots::open(&model, args.threads.map_or_else(cores, |n| n as usize), say)?;
    let most = saved.max_length - 1;
    let mut prompt = saved.tokenizer.encode(&args.prompt, None, usize::MAX)?.ids;
    if prompt.len() > most && !args.generation.truncates() {
        bail_unusable!(
            "the prompt has {} tokens, and {most} leave room for a new one; --truncate-prompt cuts its front",
            prompt.len()
        );
    }
    prompt.drain(..prompt.len().saturating_sub(most));
    if prompt.is_empty() {
        prompt.push(end); // what stands in front of a text
    }
    let streams = settings.num_return_sequences == 1 && !say.json;
    let request = Request { prompt, settings };
    let mut engine = Engine::new(slots, saved.tokenizer.inner(), end, saved.max_length, limits);
    if !engine.fits(&request) {
        bail_unusable!("the prompt and its text take more than --cache-mb allows");
    }
    let mut texts = engine.run(std::slice::from_ref(&request), &mut |news| {
        if streams {
            say::print(news.text)?;
        }
        Ok(())
    })?;
    let texts = texts.remove(0);
    if streams {
        say::print("\n")?;
    }
    let human: Vec<&str> =
        texts.iter().filter(|_| !streams).map(|generated| generated.text.as_str()).collect();
    let result: Vec<_> = texts.iter().map(crate::cmd::generation::fields).collect();
    if streams {
        return Ok(());
    }
    say.result(human.join("\n---\n"), &json!({"prompt_tokens": request.prompt.len(), "texts": result}))
}
