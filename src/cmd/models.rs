//! `tk models`: which families can be trained for which tasks.

use serde_json::{Map, Value, json};

use crate::Result;
use crate::model::Family;
use crate::say::{self, Say};
use crate::task::Task;

/// List the model families and the tasks that each of them can be trained for, exported and served.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints the table, or with `--json` the class in `transformers` behind each of its places.
pub fn run(_: &Args, say: Say) -> Result<()> {
    let types = Family::model_types();
    let class = |model_type: &str, (_, head): &(&str, _)| Family::class_of(model_type, *head);
    let tasks: Vec<_> = Task::NAMES.iter().copied().zip(Task::HEADS.iter().copied()).collect();
    if say.json {
        let of_type = |model_type: &&str| {
            let classes = tasks.iter().map(|task| (task.0.to_owned(), json!(class(model_type, task))));
            ((*model_type).to_owned(), Value::Object(classes.collect()))
        };
        let table: Map<String, Value> = types.iter().map(of_type).collect();
        return say::print(format!("{}\n", Value::Object(table)).into_bytes());
    }
    let first = tasks.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut table = format!("{:first$}", "");
    types.iter().for_each(|name| table += &format!("  {name}"));
    for task in &tasks {
        table += &format!("\n{:first$}", task.0);
        for name in &types {
            let has = if class(name, task).is_some() { "yes" } else { "-" };
            table += &format!("  {has:width$}", width = name.len());
        }
    }
    let lines: Vec<&str> = table.lines().map(str::trim_end).collect();
    say::print(format!(
        "{}\n\nyes: train, eval, export, parity and serve-batch, held against transformers' numbers\n  -: transformers has \
         no such head for the family; as decoders, which causal-lm needs, tk runs no encoders\n",
        lines.join("\n")
    ).into_bytes())
}
