//! The command line: arguments (and `--config` files) → one command's settings.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};

use crate::cmd;
use crate::say::{Say, nearest};
use crate::train::checkpoint::Folder;
use crate::{Result, bail_unusable, unusable};

/// Fine-tunes transformers, exports them to ONNX, serves them through ONNX Runtime, and proves that what is
/// served is what was trained.
#[derive(Debug, Parser)]
#[command(
    name = "tk",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Say nothing but errors.
    #[arg(short, long, global = true, help_heading = "General")]
    quiet: bool,
    /// Say more.
    #[arg(short, long, global = true, conflicts_with = "quiet", help_heading = "General")]
    verbose: bool,
    /// Print the result as one JSON object on stdout.
    #[arg(long, global = true, help_heading = "General")]
    json: bool,
    /// Read options from a TOML file: `learning-rate = 3e-5` stands for `--learning-rate 3e-5`. The command
    /// line wins.
    #[arg(long, global = true, value_name = "FILE", help_heading = "General")]
    config: Option<PathBuf>,
}

/// What tk does.
#[derive(Debug, Subcommand)]
#[command(args_override_self = true)]
pub enum Command {
    Train(Box<cmd::train::Args>),
    Eval(cmd::eval::Args),
    Export(cmd::export::Args),
    Parity(cmd::parity::Args),
    Report(cmd::report::Args),
    Generate(Box<cmd::generate::Args>),
    ServeBatch(Box<cmd::serve_batch::Args>),
    Serve(Box<cmd::serve::Args>),
    Bench(Box<cmd::bench::Args>),
    Sweep(cmd::sweep::Args),
    Models(cmd::models::Args),
    Doctor(cmd::doctor::Args),
    Completions(cmd::completions::Args),
}

impl Cli {
    /// Parses arguments, the first of which is the program's name.
    ///
    /// # Errors
    /// A `--config` file that can't be read or has options the command does not know. Wrong usage of the
    /// command line itself ends the process, as clap does it.
    pub fn parse_with_config(args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let args = expand_config(args.into_iter().collect())?;
        Ok(Self::parse_from(expand_resumed(args)?))
    }

    /// How much is to be said.
    pub fn say(&self) -> Say {
        Say { quiet: self.quiet, verbose: self.verbose, json: self.json, ..Say::default() }
    }
}

/// Puts a `--config` file's options behind the command's name, where later ones override them.
fn expand_config(mut args: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some(path) = value_of(&args, "--config") else {
        return Ok(args);
    };
    let cli = Cli::command();
    let found = args.iter().enumerate().skip(1).find_map(|(at, arg)| Some((at, cli.find_subcommand(arg)?)));
    let Some((at, command)) = found else {
        return Ok(args);
    };
    let options = config_options(Path::new(&path), command, &args[at + 1..])?;
    args.splice(at + 1..at + 1, options.into_iter().map(OsString::from));
    Ok(args)
}

/// Puts the settings that a run was started with behind `tk train --resume`, so that nobody has to repeat them.
fn expand_resumed(mut args: Vec<OsString>) -> Result<Vec<OsString>> {
    let at = args.iter().position(|arg| arg == "train");
    let (Some(at), Some(output)) = (at, value_of(&args, "--output")) else {
        return Ok(args);
    };
    let settings = Folder::of(Path::new(&output)).settings();
    let cli = Cli::command();
    if let (true, true, Some(command)) =
        (args.iter().any(|arg| arg == "--resume"), settings.is_file(), cli.find_subcommand("train"))
    {
        let options = config_options(&settings, command, &args[at + 1..])?;
        args.splice(at + 1..at + 1, options.into_iter().map(OsString::from));
    }
    Ok(args)
}

/// The value that the command line gives an option.
fn value_of(args: &[OsString], option: &str) -> Option<OsString> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.to_str().and_then(|text| text.strip_prefix(option)) {
            Some("") => return args.next().cloned(),
            Some(rest) if rest.starts_with('=') => return Some(rest[1..].into()),
            _ => {}
        }
    }
    None
}

/// A file's options, less those that `later` arguments exclude: `--batch-tokens` there wins over the file's
/// `batch-size`.
fn config_options(path: &Path, command: &clap::Command, later: &[OsString]) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|e| unusable!("{}: {e}", path.display()))?;
    let table: toml::Table = toml::from_str(&text).map_err(|e| unusable!("{}: {e}", path.display()))?;
    table_options(&table, command, later).map_err(|error| error.context(path.display().to_string()))
}

fn table_options(table: &toml::Table, command: &clap::Command, later: &[OsString]) -> Result<Vec<String>> {
    let known: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
    let mut options = Vec::new();
    for (key, value) in table {
        let key = key.replace('_', "-");
        if !known.contains(&key.as_str()) {
            let hint = match nearest(&key, &known) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => format!("it has {}", known.join(", ")),
            };
            bail_unusable!("tk {} has no option \"{key}\"; {hint}", command.get_name());
        }
        if excluded(&key, command, later) {
            continue;
        }
        let text = |value: &toml::Value| match value {
            toml::Value::String(text) => Ok(text.clone()),
            toml::Value::Integer(_) | toml::Value::Float(_) => Ok(value.to_string()),
            other => Err(unusable!("{key} is {other}, expected a string or a number")),
        };
        match value {
            toml::Value::Boolean(true) => options.push(format!("--{key}")),
            toml::Value::Boolean(false) => {}
            toml::Value::Array(list) => {
                let list = list.iter().map(text).collect::<Result<Vec<_>>>()?;
                if of(&key, command).is_some_and(adds_up) {
                    options.extend(list.iter().map(|text| format!("--{key}={text}")));
                } else {
                    options.push(format!("--{key}={}", list.join(",")));
                }
            }
            value => options.push(format!("--{key}={}", text(value)?)),
        }
    }
    Ok(options)
}

/// The option of this name.
fn of<'a>(key: &str, command: &'a clap::Command) -> Option<&'a clap::Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(key))
}

/// Whether an option that is given again adds to what was given: each is one of a list.
fn adds_up(arg: &clap::Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) && arg.get_value_delimiter().is_none()
}

/// Whether arguments hold an option that stands in the place of option `key`, or can't stand beside it.
fn excluded(key: &str, command: &clap::Command, args: &[OsString]) -> bool {
    let given = |arg: &clap::Arg| {
        let names = arg.get_long().into_iter().chain(arg.get_all_aliases().unwrap_or_default());
        names.into_iter().any(|name| args.iter().any(|arg| is_option(arg, name)))
    };
    let rivals = |arg: &clap::Arg, other: &clap::Arg| {
        command.get_arg_conflicts_with(arg).iter().any(|rival| rival.get_id() == other.get_id())
    };
    let all = || command.get_arguments();
    of(key, command).is_some_and(|own| {
        let is_given = adds_up(own) && given(own);
        is_given || all().any(|arg| (rivals(own, arg) || rivals(arg, own)) && given(arg))
    })
}

/// Whether an argument is the long option of this name, with a value behind `=` or without.
fn is_option(arg: &OsString, name: &str) -> bool {
    let text = arg.to_str().and_then(|text| text.strip_prefix("--"));
    text.is_some_and(|text| text.split('=').next() == Some(name))
}

/// Reads settings, named as in a `--config` file, as `tk train` does, and refuses what needs no look into a file; the files
/// of records that they name.
fn training_files(settings: &toml::Table) -> Result<Vec<PathBuf>> {
    let cli = Cli::command();
    let train = cli.find_subcommand("train").context("no command train")?;
    let options = table_options(settings, train, &[])?;
    let args = ["tk", "train", "--output=-"].map(str::to_owned);
    let parsed = Cli::try_parse_from(args.into_iter().chain(options));
    match parsed.map(|cli| cli.command) {
        Ok(Command::Train(args)) => args.looked_at(),
        Ok(_) => bail_unusable!("no settings of tk train"),
        Err(error) => {
            // what is wrong stands in the first paragraph, how the command is used in others
            let said = error.to_string();
            let wrong = said.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            bail_unusable!("{}", wrong.split_whitespace().collect::<Vec<_>>().join(" "))
        }
    }
}

/// Runs the parsed command.
pub fn run(cli: Cli) -> Result<()> {
    let say = cli.say();
    match cli.command {
        Command::Train(args) => cmd::train::run(&args, say),
        Command::Eval(args) => cmd::eval::run(&args, say),
        Command::Export(args) => cmd::export::run(&args, say),
        Command::Parity(args) => cmd::parity::run(&args, say),
        Command::Report(args) => cmd::report::run(&args, say),
        Command::Generate(args) => cmd::generate::run(&args, say),
        Command::ServeBatch(args) => cmd::serve_batch::run(&args, say),
        Command::Serve(args) => cmd::serve::run(&args, say),
        Command::Bench(args) => cmd::bench::run(&args, say),
        Command::Sweep(args) => cmd::sweep::run(&args, training_files, say),
        Command::Models(args) => cmd::models::run(&args, say),
        Command::Doctor(args) => cmd::doctor::run(&args, say),
        Command::Completions(args) => cmd::completions::run(&args),
    }
}
