//! A report as a page that stands on its own.

use std::fmt::Write;

use indicatif::HumanCount;

use super::chart::{self, Line};
use super::history::{Audit, Audited, Point};
use super::{Report, Seen};
use crate::Result;
use crate::html::{self, beginning, escaped};
use crate::task::review::{Calibration, Confusion, Review, Row, Wrong};

/// Characters of a text that are shown.
const TEXT: usize = 400;
/// Characters of an answer.
const ANSWER: usize = 240;
/// Labels of a confusion matrix that is shown as a whole.
const WHOLE: usize = 20;
/// Pairs of labels that are listed where there are more.
const PAIRS: usize = 30;
/// Labels whose rows are shown: those that are found worst.
const ROWS: usize = 60;
/// Curves that are drawn, of a log that may have any.
const CURVES: usize = 60;
/// Labels of a model that are listed.
const LABELS: usize = 12;

const STYLE: &str = "\
body { max-width: 96em; padding: clamp(.8em, 3vw, 2.5em); } h3 { font-size: 1em; margin: 0 0 .4em; }
.under { color: var(--soft); margin-top: -.6em; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; padding: 0; margin: 1em 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5em 1em; }
.tiles b { display: block; font-size: 1.5em; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27em), 1fr)); gap: 1em; }
.grid .card { margin: 0; min-width: 0; } .card p, .note { color: var(--soft); font-size: .87em; margin: .5em 0 0; }
.heat { width: auto; } .heat th, .heat td { text-align: center; border: 1px solid var(--back); padding: .45em .6em; }
.heat tbody th { text-align: right; } .heat th { max-width: 9em; overflow-wrap: anywhere; }
.heat td { background: color-mix(in srgb, var(--tone) calc(var(--share) * var(--heat)), var(--card)); min-width: 3.6em;
  font-variant-numeric: tabular-nums; } .heat small { display: block; color: var(--soft); }
.hit { --tone: var(--first); } .miss { --tone: var(--second); } .heat td small { color: inherit; } .heat { --heat: 55%; }
@media screen and (prefers-color-scheme: dark) { .heat { --heat: 38%; } }
.text { white-space: pre-wrap; } .pair { border-top: 1px dashed var(--line); margin-top: .4em; padding-top: .4em; }
td.answer { min-width: 7em; max-width: 24em; overflow-wrap: anywhere; } .worst { table-layout: auto; }
dl { grid-template-columns: minmax(7em, max-content) 1fr; } .settings td:first-child { white-space: nowrap; }
@media (max-width: 40em) { .worst thead { display: none; } .worst tr { display: block; border-bottom: 1px solid var(--line);
  padding: .6em 0; } .worst td { display: inline-block; border: 0; padding: .1em 0; margin-right: 1em; max-width: none; }
  .worst td.text { display: block; margin: .2em 0; } th, td { padding: .35em .4em; }
  .worst td[data-name]::before { content: attr(data-name) \": \"; color: var(--soft); }
  dl { grid-template-columns: 1fr; } dt { margin-top: .4em; } }
@media print { .wide { overflow: visible; } .card, tr { break-inside: avoid; } body { max-width: none; padding: 0; } }";

/// The page.
///
/// # Errors
/// A curve can't be drawn.
pub fn html(report: &Report) -> Result<String> {
    let mut body = head(report);
    body += &curves(report)?;
    if let Some(seen) = &report.seen {
        body += &review(seen)?;
    }
    if let Some(audited) = report.audited.last() {
        body += &audit(audited, &report.audited)?;
    }
    body += &graphs(report);
    body += &data(report);
    let _ = writeln!(body, "<p class=\"note\">Made by tk {}.</p>", env!("CARGO_PKG_VERSION"));
    Ok(html::page(&format!("Report of {}", report.name), &format!("{}\n{STYLE}", chart::STYLE), &body))
}

fn head(report: &Report) -> String {
    let saved = report.saved;
    let kind = saved.config.architecture().unwrap_or(saved.config.family.model_type());
    let mut under = vec![
        saved.task.name().to_owned(),
        kind.to_owned(),
        format!("{} parameters", HumanCount(report.parameters as u64)),
    ];
    under.extend(report.when().map(|when| format!("written {when}")));
    let mut text = format!(
        "<h1>{}</h1>\n<p class=\"under\">{}</p>\n",
        escaped(&report.name),
        escaped(&under.join(" · "))
    );
    if let Some((metrics, on)) = report.metrics() {
        let tiles: String = metrics
            .iter()
            .map(|(name, value)| format!("<li><b>{}</b><span>{}</span></li>", number(*value), escaped(name)))
            .collect();
        let _ = writeln!(text, "<ul class=\"tiles\">{tiles}</ul>");
        let by = match (&report.seen, &report.best) {
            (Some(seen), _) => {
                format!(
                    "Measured for this report on {} ({} examples).",
                    escaped(&on),
                    HumanCount(seen.examples as u64)
                )
            }
            (None, Some(best)) => {
                format!("Of the run's best evaluation, step {}, on {}.", best.step, escaped(&on))
            }
            (None, None) => String::new(),
        };
        let _ = writeln!(text, "<p class=\"note\">{by}</p>");
    }
    if let Some(why) = &report.unseen {
        let _ =
            writeln!(text, "<p class=\"note\">Nothing was measured for this report: {}.</p>", escaped(why));
    }
    let mut facts = Vec::new();
    if let Some(started) = &report.started {
        facts.extend(started.model().map(|model| ("started from", model.to_owned())));
        facts.push(("steps", HumanCount(report.history.steps()).to_string()));
    }
    if let Some(best) = &report.best {
        let value = number(best.metrics.get(best.metric.name).copied().unwrap_or(f64::NAN));
        facts.push(("best evaluation", format!("step {}: {} {value}", best.step, best.metric.name)));
    }
    facts.extend(saved.task.summary().map(|summary| ("what it learnt", summary)));
    let (class, verdict) = verdict(report);
    let list: String =
        facts.iter().map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escaped(value))).collect();
    let _ = writeln!(
        text,
        "<dl>\n{list}<dt>what is served</dt><dd class=\"{class}\">{}</dd>\n</dl>",
        escaped(&verdict)
    );
    text
}

/// Whether the exported graphs are the trained model, and a class of the page for it.
fn verdict(report: &Report) -> (&'static str, String) {
    use super::graphs::State;
    let all = &report.graphs;
    let is_right = |graph: &&super::graphs::Graph| graph.state == State::Verified;
    match all.iter().filter(is_right).count() {
        _ if all.is_empty() => ("", "not exported yet: tk export writes and verifies the graphs".to_owned()),
        n if n == all.len() => {
            let named: Vec<&str> = all.iter().map(|graph| graph.precision.as_str()).collect();
            ("pass", format!("every exported graph was held against these weights ({})", named.join(", ")))
        }
        n => (
            "fail",
            format!(
                "{} of {} graphs are not what was verified: run tk export again",
                all.len() - n,
                all.len()
            ),
        ),
    }
}

/// A drawing with its name and what is to be said of it.
fn card(title: &str, svg: &str, note: &str) -> String {
    let note = if note.is_empty() { String::new() } else { format!("<p>{}</p>", escaped(note)) };
    format!("<div class=\"card\"><h3>{}</h3>{svg}{note}</div>\n", escaped(title))
}

fn curves(report: &Report) -> Result<String> {
    let mut cards = String::new();
    let known: [(&str, &str, Line); 4] = [
        ("loss", "training loss", Line::Smoothed),
        ("learning_rate", "learning rate", Line::Plain),
        ("grad_norm", "norm of the gradient", Line::Smoothed),
        ("tokens_per_second", "tokens a second", Line::Smoothed),
    ];
    let own = ["epoch", "tokens"];
    let others = report.history.curves.iter().map(|(name, _)| name.as_str());
    let others = others.filter(|name| {
        !own.contains(name) && !name.starts_with("eval_") && known.iter().all(|(known, ..)| known != name)
    });
    let trained = known.into_iter().chain(others.map(|name| (name, name, Line::Smoothed)));
    let evaluated =
        report.history.evaluations().map(|(metric, points)| (format!("evaluation: {metric}"), points));
    let of_training = trained.map(|(name, title, line)| (title.to_owned(), report.history.of(name), line));
    let of_evaluations = evaluated.map(|(title, points)| (title, points, Line::Dotted));
    let (of_training, of_evaluations): (Vec<_>, Vec<_>) = (of_training.collect(), of_evaluations.collect());
    // the losses first, then what the run is judged by
    let order = of_training[..1].iter().chain(&of_evaluations).chain(&of_training[1..]);
    for (title, points, line) in order.take(CURVES) {
        if let Some(svg) = chart::curve(points, *line, report.history.steps(), &told(title, points))? {
            cards += &card(title, &svg, &unusual(points));
        }
    }
    Ok(if cards.is_empty() {
        cards
    } else {
        format!(
            "<h2>The run</h2>\n<div class=\"grid\">\n{cards}</div>\n<p class=\"note\">By step. Of losses, norms and speeds \
             every step is drawn faintly (of many the extremes), and a moving mean over it.</p>\n"
        )
    })
}

/// A curve for who can't see it.
fn told(title: &str, points: &[Point]) -> String {
    let numbers = || points.iter().filter(|(_, value)| value.is_finite());
    let (Some(first), Some(last)) = (numbers().next(), numbers().next_back()) else {
        return title.to_owned();
    };
    let by = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
    let (low, high) = (numbers().min_by(by), numbers().max_by(by));
    let of = |point: Option<&Point>| point.map_or_else(String::new, |point| number(point.1));
    format!(
        "{title} from step {} to {}: {} at first, {} at last, between {} and {}",
        first.0,
        last.0,
        number(first.1),
        number(last.1),
        of(low),
        of(high)
    )
}

/// What is not finite in a curve.
fn unusual(points: &[Point]) -> String {
    let bad: Vec<u64> =
        points.iter().filter(|(_, value)| !value.is_finite()).map(|(step, _)| *step).collect();
    match bad.first() {
        None => String::new(),
        Some(first) => {
            format!("{} of {} are no numbers (marked ×), the first at step {first}", bad.len(), points.len())
        }
    }
}

fn review(seen: &Seen) -> Result<String> {
    let review = &seen.review;
    let mut text = String::new();
    if let Some(found) = &review.confusion {
        text += &confusion(found);
    }
    if !review.rows.is_empty() {
        text += &rows(&review.rows, review.rows_of);
    }
    let mut cards = String::new();
    if let Some(found) = &review.calibration {
        cards += &calibration(found)?;
    }
    if !review.numbers.is_empty() {
        let told =
            format!("{} numbers that were predicted, over those that were wanted", review.numbers.len());
        cards += &card(
            "Predicted over wanted",
            &chart::cloud(&review.numbers, &told)?,
            "On the line both are the same.",
        );
    }
    if !cards.is_empty() {
        let _ = writeln!(
            text,
            "<h2>How far predictions can be relied on</h2>\n<div class=\"grid\">\n{cards}</div>"
        );
    }
    if !review.worst.is_empty() {
        text += &worst(review, &seen.files);
    }
    Ok(text)
}

/// The matrix, where it is not too large; else the pairs that are confused most.
fn confusion(confusion: &Confusion) -> String {
    let Confusion { labels, counts } = confusion;
    if labels.len() > WHOLE {
        let mut pairs: Vec<_> = counts.iter().filter(|(wanted, found, _)| wanted != found).collect();
        pairs.sort_by_key(|(_, _, count)| std::cmp::Reverse(*count));
        let more = pairs.len().saturating_sub(PAIRS);
        let rows: String = pairs
            .iter()
            .take(PAIRS)
            .map(|&&(wanted, found, count)| {
                let (wanted, found) = (beginning(&labels[wanted], ANSWER), beginning(&labels[found], ANSWER));
                format!("<tr><td>{wanted}</td><td>{found}</td><td class=\"n\">{count}</td></tr>\n")
            })
            .collect();
        let note =
            if more > 0 { format!("<p class=\"note\">And {more} other pairs.</p>") } else { String::new() };
        return format!(
            "<h2>Most confused labels</h2>\n<div class=\"wide\"><table><thead><tr><th scope=\"col\">wanted</th>\
             <th scope=\"col\">predicted</th><th scope=\"col\">how often</th></tr></thead><tbody>\n{rows}</tbody></table></div>\n{note}"
        );
    }
    let name = |label: &String| beginning(label, 40);
    let across: String =
        labels.iter().map(|label| format!("<th scope=\"col\">{}</th>", name(label))).collect();
    let mut rows = String::new();
    for (wanted, label) in labels.iter().enumerate() {
        let own = counts.iter().filter(|(of, ..)| *of == wanted);
        let all: usize = own.clone().map(|(.., count)| count).sum();
        let _ = write!(rows, "<tr><th scope=\"row\">{}</th>", name(label));
        for found in 0..labels.len() {
            let count = own.clone().find(|(_, at, _)| *at == found).map_or(0, |(.., count)| *count);
            let share = count as f64 / all.max(1) as f64;
            let class = if wanted == found { "hit" } else { "miss" };
            let _ = write!(
                rows,
                "<td class=\"{class}\" style=\"--share:{share:.3}\">{count}<small>{:.1} %</small></td>",
                100.0 * share
            );
        }
        rows += "</tr>\n";
    }
    format!(
        "<h2>Confusion</h2>\n<p class=\"note\">Rows: what was wanted. Columns: what was predicted. Shares are of the row.</p>\n\
         <div class=\"wide\"><table class=\"heat\"><thead><tr><td></td>{across}</tr></thead><tbody>\n{rows}</tbody></table></div>\n"
    )
}

fn rows(all: &[Row], of: &str) -> String {
    let mut shown: Vec<&Row> = all.iter().collect();
    let mut note = String::new();
    if all.len() > ROWS {
        shown.sort_by(|a, b| a.f1.total_cmp(&b.f1));
        shown.truncate(ROWS);
        note = format!("<p class=\"note\">The {ROWS} of {} with the lowest F1.</p>\n", all.len());
    }
    let row = |row: &&Row| {
        let Row { label, precision, recall, f1, support, predicted } = row;
        format!(
            "<tr><td>{}</td><td class=\"n\">{precision:.4}</td><td class=\"n\">{recall:.4}</td><td class=\"n\">{f1:.4}</td>\
             <td class=\"n\">{support}</td><td class=\"n\">{predicted}</td></tr>\n",
            beginning(label, ANSWER)
        )
    };
    let rows: String = shown.iter().map(row).collect();
    format!(
        "<h2>By {of}</h2>\n<div class=\"wide\"><table><thead><tr><th scope=\"col\">{of}</th><th scope=\"col\">precision</th>\
         <th scope=\"col\">recall</th><th scope=\"col\">F1</th><th scope=\"col\">wanted</th><th scope=\"col\">predicted</th></tr>\
         </thead><tbody>\n{rows}</tbody></table></div>\n{note}"
    )
}

fn calibration(found: &Calibration) -> Result<String> {
    let told = format!(
        "reliability diagram of {} bins, expected calibration error {:.4}",
        found.bins.len(),
        found.ece
    );
    let note = format!(
        "Expected calibration error {:.4}, in {} bins. Bars: how often a prediction of that probability is right; dots: at the \
         mean probability of the bin; on the line predictions are right as often as they claim.",
        found.ece,
        found.bins.len()
    );
    Ok(card("Calibration", &chart::reliability(found, &told)?, &note))
}

fn worst(review: &Review, file: &str) -> String {
    let Review { worst, wrong, scores, .. } = review;
    let head = scores.map(|name| format!("<th scope=\"col\">{name}</th>")).unwrap_or_default();
    let row = |wrong: &Wrong| {
        let pair = wrong
            .pair
            .as_ref()
            .map(|pair| format!("<div class=\"pair\" dir=\"auto\">{}</div>", beginning(pair, TEXT)));
        let score = scores.map(|name| {
            let score = wrong.score.map(|score| format!("{score:.3}")).unwrap_or_default();
            format!("<td class=\"n\" data-name=\"{name}\">{score}</td>")
        });
        format!(
            "<tr><td class=\"n\" data-name=\"line\">{}</td><td class=\"n\" data-name=\"loss\">{}</td><td class=\"text\" \
             dir=\"auto\">{}{}</td><td class=\"answer\" dir=\"auto\" data-name=\"wanted\">{}</td><td class=\"answer\" \
             dir=\"auto\" data-name=\"found\">{}</td>{}</tr>\n",
            wrong.line,
            number(wrong.loss),
            beginning(&wrong.text, TEXT),
            pair.unwrap_or_default(),
            beginning(&wrong.wanted, ANSWER),
            beginning(&wrong.found, ANSWER),
            score.unwrap_or_default(),
        )
    };
    let rows: String = worst.iter().map(row).collect();
    format!(
        "<h2>Worst errors</h2>\n<p class=\"note\">{} of {wrong} answers that are not right, those of the highest loss first; \
         lines of {}.</p>\n<div class=\"wide\"><table class=\"worst\"><thead><tr><th scope=\"col\">line</th>\
         <th scope=\"col\">loss</th><th scope=\"col\">text</th><th scope=\"col\">wanted</th><th scope=\"col\">found</th>\
         {head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n",
        worst.len(),
        escaped(file)
    )
}

/// The last audited step, a row a parameter, those that changed most first.
fn audit(last: &Audited, all: &[Audited]) -> Result<String> {
    let mut parameters: Vec<&Audit> = last.parameters.iter().collect();
    let ratio = |row: &&Audit| row.update_ratio.unwrap_or(f64::NEG_INFINITY);
    parameters.sort_by(|a, b| ratio(b).total_cmp(&ratio(a)));
    let show = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2e}"));
    let rows: String = parameters
        .iter()
        .map(|row| {
            format!(
                "<tr><td><code>{}</code></td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
                 <td class=\"n\">{}</td><td class=\"n\">{}</td></tr>\n",
                escaped(&row.name),
                show(row.update_ratio),
                show(row.grad_norm),
                show(row.weight_norm),
                show(row.update_norm),
                row.zeros.map_or_else(|| "–".to_owned(), |zeros| format!("{:.1} %", 100.0 * zeros)),
            )
        })
        .collect();
    let mut cards = String::new();
    let middle = |audited: &Audited| {
        let mut ratios: Vec<f64> = audited.parameters.iter().filter_map(|row| row.update_ratio).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let points: Vec<Point> = all.iter().map(|audited| (audited.step, middle(audited))).collect();
    let title = "updates over weights, the middle parameter";
    if let Some(svg) = chart::curve(&points, Line::Dotted, last.step, &told(title, &points))? {
        cards = format!("<div class=\"grid\">{}</div>\n", card(title, &svg, "About 1e-3 is usual."));
    }
    Ok(format!(
        "<h2>What a step does to each parameter</h2>\n{cards}<details><summary>Step {}, {} parameters, the largest updates \
         first</summary>\n<div class=\"wide\"><table><thead><tr><th scope=\"col\">parameter</th><th scope=\"col\">update / weight\
         </th><th scope=\"col\">gradient</th><th scope=\"col\">weight</th><th scope=\"col\">update</th><th scope=\"col\">zeros in the \
         gradient</th></tr></thead><tbody>\n{rows}</tbody></table></div></details>\n",
        last.step,
        parameters.len()
    ))
}

fn graphs(report: &Report) -> String {
    if report.graphs.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for graph in &report.graphs {
        let class = if graph.state == super::graphs::State::Verified { "pass" } else { "fail" };
        let lost = graph.gate.as_ref().map(|gate| {
            let on = gate.records.map(|n| format!(" on {} records", HumanCount(n))).unwrap_or_default();
            format!("{} {} → {}{on}", gate.metric, number(gate.before), number(gate.after))
        });
        let _ = writeln!(
            rows,
            "<tr><td><code>{}</code></td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td>\
             <td class=\"{class}\">{}</td></tr>",
            escaped(&graph.file),
            escaped(&graph.precision),
            graph.opset.map(|opset| opset.to_string()).unwrap_or_default(),
            graph.max_abs.map(|apart| format!("{apart:.1e}")).unwrap_or_default(),
            escaped(&lost.unwrap_or_default()),
            graph.state.told()
        );
    }
    format!(
        "<h2>Exported graphs</h2>\n<div class=\"wide\"><table><thead><tr><th scope=\"col\">file</th><th scope=\"col\">precision\
         </th><th scope=\"col\">opset</th><th scope=\"col\">largest |Δ| to the trained model</th><th scope=\"col\">fp32 → this\
         </th><th scope=\"col\">verdict</th></tr></thead><tbody>\n{rows}</tbody></table></div>\n"
    )
}

fn data(report: &Report) -> String {
    let Some(started) = &report.started else { return String::new() };
    let name_of = |name: &str| match name {
        "train" => listed(started.train()),
        "eval" => listed(started.eval()),
        _ => String::new(),
    };
    let inputs: String = started
        .inputs
        .iter()
        .map(|(name, hash)| {
            format!(
                "<tr><td>{}</td><td class=\"answer\">{}</td><td><code>{}</code></td></tr>\n",
                escaped(name),
                escaped(&name_of(name)),
                escaped(hash)
            )
        })
        .collect();
    let settings: String = started
        .table
        .iter()
        .map(|(name, value)| {
            let value = match value {
                toml::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            format!("<tr><td>{}</td><td><code>{}</code></td></tr>\n", escaped(name), beginning(&value, TEXT))
        })
        .collect();
    format!(
        "<h2>Data</h2>\n<div class=\"wide\"><table><thead><tr><th scope=\"col\">input</th><th scope=\"col\">file</th>\
         <th scope=\"col\">sha256</th></tr></thead><tbody>\n{inputs}</tbody></table></div>\n<h2>Settings</h2>\n<div class=\"wide\">\
         <table class=\"settings\"><thead><tr><th scope=\"col\">setting</th><th scope=\"col\">value</th></tr></thead><tbody>\n\
         {settings}</tbody></table></div>\n"
    )
}

fn listed(paths: &[std::path::PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    crate::say::listed(names.iter().map(String::as_str), LABELS)
}

/// A number that people read.
fn number(x: f64) -> String {
    match x.abs() {
        size if !x.is_finite() || size == 0.0 => format!("{x}"),
        size if (1e-3..1e6).contains(&size) => format!("{x:.4}"),
        _ => format!("{x:.2e}"),
    }
}
