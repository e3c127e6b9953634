//! `tk generate`: a prompt → text, as it arrives.

use std::path::PathBuf;

use serde_json::json;

use crate::generate::{self, Ends, Engine, Prompt, Prompts};
use crate::onnx::Precision;
use crate::predict::graphs;
use crate::runtime::{EpFlags, Slots};
use crate::saved::Saved;
use crate::say::{self, Say};
use crate::{Result, bail_unusable, process};

/// Go on with a prompt, through ONNX Runtime, on standard output.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The language model's directory, exported by `tk export`.
    dir: PathBuf,
    /// What the text goes on from.
    #[arg(default_value = "")]
    prompt: String,
    /// Which of the exported graphs: fp32, fp16, q8 or q4; on cuda fp16.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    #[command(flatten)]
    ep: EpFlags,
    /// Threads that compute [default: the cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Draw from the K most likely tokens.
    #[arg(long, value_name = "K", help_heading = "Generation")]
    top_k: Option<usize>,
    #[command(flatten)]
    generation: generate::Flags,
}

/// Writes the text as it arrives; several texts one after another, each when it is whole.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let providers = generate::providers(&args.ep, args.precision, say)?;
    let (settings, limits) = (args.generation.settings(args.top_k)?, args.generation.limits()?);
    let saved = Saved::open(&args.dir)?;
    let lm = saved.task.generating("generate")?;
    let (ends, positions) = (Ends::of(&saved.dir, lm)?, saved.config.max_positions());
    let prompts = Prompts::new(&saved, lm, &ends, positions, args.generation.truncates())?;
    let Prompt { request, truncated } = prompts.request(&args.prompt, settings)?;
    if truncated {
        say.warn(format!("the prompt is cut to its last {} tokens", request.prompt.len()));
    }
    let model = graphs::checked_generating(&saved, args.precision)?;
    let threads = args.threads.map_or_else(process::cores, |n| n as usize);
    let slots = Slots::open(&model, &providers, threads, say)?;
    let streams = request.settings.num_return_sequences == 1 && !say.json;
    let mut engine = Engine::new(slots, saved.tokenizer.inner(), ends.ends, positions, limits);
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
    let result: Vec<_> = texts.iter().map(generate::fields).collect();
    if streams {
        return Ok(());
    }
    say.result(
        human.join("\n---\n"),
        &json!({"prompt_tokens": request.prompt.len(), "truncated": truncated, "texts": result}),
    )
}
