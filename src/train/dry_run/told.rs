//! What was found, for people.

use std::fmt::Write;

use indicatif::HumanCount;

use super::split::Split;
use super::{DryRun, Shown};
use crate::say::listed;

/// Labels of a split that are listed.
const LISTED: usize = 12;
/// Files of a split that are listed.
const FILES: usize = 4;
/// Tokens of an example that are shown.
const TOKENS: usize = 40;

impl DryRun {
    /// Some lines of text.
    pub fn told(&self) -> String {
        let mut text = String::new();
        // writing to a string does not fail
        let _ = self.write(&mut text);
        text.truncate(text.trim_end().len());
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Self { model, teacher, train, eval, plan, estimate, warnings, .. } = self;
        writeln!(
            out,
            "model       {} for {}; {} parameters are trained, {} frozen",
            model.family,
            model.task,
            grouped(model.trained),
            grouped(model.frozen)
        )?;
        if model.from_scratch {
            writeln!(out, "            all drawn anew")?;
        }
        for (what, names) in [("drawn anew", &model.drawn_anew), ("not used", &model.unused)] {
            if !names.is_empty() {
                writeln!(out, "            {what}: {}", listed(names.iter().map(String::as_str), LISTED))?;
            }
        }
        if let Some(teacher) = teacher {
            writeln!(out, "teacher     {}", teacher.told())?;
        }
        for split in [Some(train), eval.as_ref()].into_iter().flatten() {
            split.write(plan.max_length, out)?;
        }
        for (i, shown) in self.examples.iter().enumerate() {
            writeln!(out, "{:12}{}", if i == 0 { "examples" } else { "" }, shown.told())?;
        }
        let batch = match (plan.batch_size, plan.batch_tokens) {
            (Some(records), _) => format!("{records} records"),
            (None, tokens) => format!("{} tokens", grouped(tokens.unwrap_or_default())),
        };
        let micro = if plan.accumulation > 1 {
            format!(" in {} micro-batches", plan.accumulation)
        } else {
            String::new()
        };
        writeln!(
            out,
            "plan        {} steps of {batch}{micro} ({:.2} epochs), {} of them warm-up, then {}",
            grouped(plan.steps),
            plan.epochs,
            grouped(plan.warmup_steps),
            plan.schedule
        )?;
        for group in &plan.groups {
            writeln!(
                out,
                "            {}: {} parameters of {} numbers, learning rate {:e}, weight decay {}",
                group.what,
                group.parameters,
                grouped(group.numbers),
                group.learning_rate as f32, // with no more digits than the product that it is deserves
                group.weight_decay
            )?;
        }
        if !plan.class_weights.is_empty() {
            let weights: Vec<String> =
                plan.class_weights.iter().map(|(name, weight)| format!("{name} {weight:.4}")).collect();
            writeln!(
                out,
                "            class weights: {}",
                listed(weights.iter().map(String::as_str), LISTED)
            )?;
        }
        let memory = match estimate.peak_rss_bytes {
            0 => String::new(), // the system does not tell
            bytes => format!("; {:.2} GB of memory", bytes as f64 / 1e9),
        };
        writeln!(
            out,
            "estimate    {} for the whole run, evaluations {}included, by a step of {} tokens in {:.2} s{memory}",
            duration(estimate.seconds),
            if teacher.is_some() { "and the teacher " } else { "" },
            grouped(estimate.step_tokens),
            estimate.step_seconds
        )?;
        if warnings.is_empty() {
            writeln!(out, "warnings    none")?;
        }
        for (i, warning) in warnings.iter().enumerate() {
            writeln!(
                out,
                "{:12}{}: {}",
                if i == 0 { "warnings" } else { "" },
                warning.kind,
                warning.message
            )?;
        }
        Ok(())
    }
}

impl Split {
    fn write(&self, max_length: usize, out: &mut String) -> std::fmt::Result {
        let Self { lengths, .. } = self;
        let place = match &self.files[..] {
            [_] => self.path.clone(),
            files => {
                let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
                format!("{} files ({})", files.len(), listed(names.iter().map(String::as_str), FILES))
            }
        };
        let of = self.drawn_from.map(|all| format!(", of {}", grouped(all))).unwrap_or_default();
        writeln!(out, "{:12}{place}: {} records{of}", self.name, grouped(self.records))?;
        let (mut read, mut not) = (Vec::new(), Vec::new());
        for (column, read_as) in &self.columns {
            match read_as {
                Some(wanted) if wanted == column => read.push(column.clone()),
                Some(wanted) => read.push(format!("{column} as {wanted}")),
                None => not.push(column.as_str()),
            }
        }
        let not = if not.is_empty() {
            String::new()
        } else {
            format!("; not read: {}", listed(not.into_iter(), LISTED))
        };
        writeln!(out, "            columns: {}{not}", read.join(", "))?;
        if !self.labels.is_empty() {
            let all: usize = self.labels.iter().map(|(_, count)| count).sum();
            let label = |(name, count): &(String, usize)| {
                format!("{name} {} ({:.1} %)", grouped(*count), *count as f64 / all as f64 * 100.0)
            };
            let labels: Vec<String> = self.labels.iter().map(label).collect();
            writeln!(out, "            labels: {}", listed(labels.iter().map(String::as_str), LISTED))?;
        }
        let of = if lengths.of < self.records {
            format!(" (of {} that were drawn)", grouped(lengths.of))
        } else {
            String::new()
        };
        writeln!(
            out,
            "            tokens{of}: 50 % at most {}, 90 % {}, 99 % {}, the longest {}; {} above --max-length {max_length}",
            lengths.p50,
            lengths.p90,
            lengths.p99,
            lengths.longest,
            grouped(lengths.above_maximum)
        )?;
        writeln!(out, "            {} examples, {} of them cut", grouped(self.examples), grouped(self.cut))
    }
}

impl Shown {
    fn told(&self) -> String {
        let token = |(i, token): (usize, &String)| match self.labels.get(i) {
            Some(Some(label)) => format!("{token}/{label}"),
            _ => token.clone(),
        };
        let mut tokens: Vec<String> = self.tokens.iter().enumerate().take(TOKENS).map(token).collect();
        if self.tokens.len() > TOKENS {
            tokens.push(format!("… {} more", self.tokens.len() - TOKENS));
        }
        let label = self.label.iter().map(|label| format!("  →  {label}"));
        tokens.join(" ") + &label.collect::<String>()
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn grouped(n: usize) -> HumanCount {
    HumanCount(n as u64)
}
