//! The report as a page that stands on its own: what a team attaches to a release.

use std::fmt::Write;

use super::detail::{Detail, LEAST, Layer};
use super::report::{first_difference, metric, verdict};
use super::{Compared, Subject};
use crate::Result;
use crate::checkpoint::{file_hash, weight_files};
use crate::html::{self, escaped};
use crate::runtime::library;

/// What was compared, and where.
pub struct About {
    /// What the page is called.
    pub title: String,
    /// Names and values: versions, hashes, the machine.
    pub facts: Vec<(&'static str, String)>,
    /// Runtimes that this machine lacks, and why.
    pub lacking: Vec<(&'static str, String)>,
}

impl About {
    /// The facts of a comparison.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn of(title: String, subject: &Subject, lacking: Vec<(&'static str, String)>) -> Result<Self> {
        let saved = subject.saved;
        let (kind, class) = (saved.config.family.model_type(), saved.config.architecture());
        let mut facts = vec![
            ("task", saved.task.name().to_owned()),
            ("model", class.unwrap_or(kind).to_owned()),
            ("records", subject.encodings.len().to_string()),
            ("graph, sha256", file_hash(subject.graph)?),
        ];
        for path in weight_files(&saved.dir)? {
            facts.push(("weights, sha256", file_hash(&path)?));
        }
        facts.push(("tokenizer, sha256", saved.tokenizer.hash().to_owned()));
        facts.push(("tk", env!("CARGO_PKG_VERSION").to_owned()));
        if let Ok(library) = library::library() {
            let file = library.path.file_name().unwrap_or_default().display().to_string();
            facts.push(("ONNX Runtime", file));
        }
        let cpu = crate::process::cpu_model().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        facts.push((
            "machine",
            format!("{cpu}, {} threads, {}", crate::process::cores(), std::env::consts::OS),
        ));
        Ok(Self { title, facts, lacking })
    }
}

/// Of the drawings.
const STYLE: &str = "\
svg text { font-size: 11px; }
svg .axis { stroke: var(--line); } svg .first { stroke: var(--first); fill: none; stroke-width: 2; }
svg .second { stroke: var(--second); fill: none; stroke-width: 2; stroke-dasharray: 5 3; } svg rect { fill: var(--first); }
svg .dot { fill: var(--first); } svg .dot2 { fill: var(--second); }";

/// The page.
pub fn html(about: &About, compared: &[Compared], details: &[Detail]) -> String {
    let title = escaped(&about.title);
    let pass = compared.iter().all(|c| c.pass);
    let (class, said) = if pass { ("pass", "all runtimes agree") } else { ("fail", "runtimes differ") };
    let mut page = format!("<h1>Parity of {title}</h1>\n<p class=\"{class}\">{said}</p>\n");
    page += &summary(compared);
    page += &outputs(compared);
    for detail in details {
        let _ = writeln!(page, "<h2>{} beside candle</h2>", detail.name); // writing to a String can't fail
        if !detail.layers.is_empty() {
            let _ = writeln!(page, "<div class=\"card\">{}</div>", curve(&detail.layers));
        }
        let _ = writeln!(page, "<div class=\"card\">{}</div>", histogram(detail));
        page += &worst(detail);
    }
    if !about.lacking.is_empty() {
        let list: String = about
            .lacking
            .iter()
            .map(|(name, why)| format!("<li><b>{name}</b>: {}</li>\n", escaped(why)))
            .collect();
        let _ = writeln!(page, "<h2>Not on this machine</h2>\n<ul>\n{list}</ul>");
    }
    let facts: String = about
        .facts
        .iter()
        .map(|(name, value)| format!("<dt>{name}</dt><dd><code>{}</code></dd>\n", escaped(value)))
        .collect();
    let _ = writeln!(page, "<h2>What was compared</h2>\n<dl>\n{facts}</dl>");
    html::page(&format!("Parity of {}", about.title), STYLE, &page)
}

fn summary(compared: &[Compared]) -> String {
    let mut rows = String::new();
    for c in compared {
        let class = if c.pass { "pass" } else { "fail" };
        let _ = writeln!(
            rows,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{:.2e}</td><td class=\"n\">{:.2e}</td><td class=\"n\">{:.1} %</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{:.0e}</td><td class=\"{class}\">{}</td>\
             <td>{}</td><td>{}</td></tr>",
            c.name,
            c.compared_with,
            c.max_abs,
            c.max_rel,
            100.0 * c.argmax_agreement,
            c.batch_invariance.map(|apart| format!("{apart:.2e}")).unwrap_or_default(),
            c.records,
            c.tolerance,
            verdict(c),
            metric(c).unwrap_or_default(),
            escaped(&first_difference(c).unwrap_or_default())
        );
    }
    format!(
        "<div class=\"wide\"><table>\n<tr><th>runtime</th><th>against</th><th>largest |Δ|</th><th>relative</th>\
         <th>argmax agrees</th><th>alone, among others</th><th>records</th><th>tolerance</th><th>verdict</th><th>metric</th>\
         <th>first difference</th></tr>\n{rows}</table></div>\n"
    )
}

fn outputs(compared: &[Compared]) -> String {
    let mut rows = String::new();
    for c in compared {
        for (name, apart) in &c.outputs {
            let _ = writeln!(
                rows,
                "<tr><td>{}</td><td><code>{name}</code></td><td class=\"n\">{:.2e}</td><td class=\"n\">{:.2e}</td>\
                 <td class=\"n\">{:.2e}</td><td class=\"n\">{:.1} %</td></tr>",
                c.name,
                apart.max_abs,
                apart.mean_abs,
                apart.max_rel,
                100.0 * apart.argmax_agreement
            );
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<h2>Outputs</h2>\n<div class=\"wide\"><table>\n<tr><th>runtime</th><th>output</th><th>largest |Δ|</th>\
         <th>mean</th><th>relative</th><th>argmax agrees</th></tr>\n{rows}</table></div>\n"
    )
}

/// The largest and the mean difference at every tap, on a scale of powers of ten.
fn curve(layers: &[Layer]) -> String {
    const TOP: f64 = 1.0;
    let (width, height, left, bottom) = (900.0, 320.0, 60.0, 90.0);
    let low = f64::from(LEAST) - 1.0;
    let x = |i: usize| left + (width - left - 20.0) * (i as f64 + 0.5) / layers.len() as f64;
    let y = |value: f64| {
        let power = if value > 0.0 { value.log10().clamp(low, TOP) } else { low };
        10.0 + (height - bottom - 10.0) * (TOP - power) / (TOP - low)
    };
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\"><title>differences layer by layer</title>"
    );
    for power in (LEAST - 1..=1).step_by(2) {
        let at = y(10f64.powi(power));
        let _ = write!(
            svg,
            "<line class=\"axis\" x1=\"{left}\" x2=\"{width}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">1e{power}</text>",
            left - 6.0,
            at + 4.0
        );
    }
    for (class, dot, value) in [
        ("first", "dot", (|layer: &Layer| f64::from(layer.largest)) as fn(&Layer) -> f64),
        ("second", "dot2", |layer| layer.mean),
    ] {
        let points: Vec<String> =
            (0..).zip(layers).map(|(i, layer)| format!("{:.1},{:.1}", x(i), y(value(layer)))).collect();
        let _ = write!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", points.join(" "));
        for (i, layer) in layers.iter().enumerate() {
            let _ = write!(
                svg,
                "<circle class=\"{dot}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}: {:.2e}</title></circle>",
                x(i),
                y(value(layer)),
                escaped(&layer.tap),
                value(layer)
            );
        }
    }
    let every = layers.len().div_ceil(16);
    for (i, layer) in layers.iter().enumerate().step_by(every) {
        let name = layer.tap.rsplitn(3, '.').collect::<Vec<_>>();
        let short = name.iter().take(2).rev().copied().collect::<Vec<_>>().join(".");
        let (at, low) = (x(i), height - bottom + 14.0);
        let _ = write!(
            svg,
            "<text x=\"{at:.1}\" y=\"{low:.1}\" text-anchor=\"end\" transform=\"rotate(-40 {at:.1} {low:.1})\">{}</text>",
            escaped(&short)
        );
    }
    svg + "</svg>\n<p>The largest difference at every tap of the definition (full), and the mean (dashed).</p>"
}

/// How many numbers differ by how much.
fn histogram(detail: &Detail) -> String {
    let (width, height, bottom) = (900.0, 200.0, 40.0);
    let most = detail.histogram.iter().copied().max().unwrap_or(0).max(1) as f64;
    let step = width / detail.histogram.len() as f64;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\"><title>how large differences are</title>"
    );
    for (i, &count) in detail.histogram.iter().enumerate() {
        let tall = (height - bottom - 20.0) * count as f64 / most;
        let name = match i {
            0 => "0".to_owned(),
            10 => "more".to_owned(),
            i => format!("&lt; 1e{}", LEAST + i as i32 - 1),
        };
        let (at, middle) = (step * i as f64, step * (i as f64 + 0.5));
        let _ = write!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"/>\
             <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{count}</text>\
             <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            at + 6.0,
            height - bottom - tall,
            step - 12.0,
            height - bottom - tall - 5.0,
            height - bottom + 18.0
        );
    }
    svg + "</svg>\n<p>How many of the outputs' numbers differ by how much.</p>"
}

fn worst(detail: &Detail) -> String {
    let mut rows = String::new();
    for worst in &detail.worst {
        let (expected, found) = worst.answers.as_ref().map_or(("", ""), |(a, b)| (a.as_str(), b.as_str()));
        let text = html::beginning(&worst.text, 300);
        let _ = writeln!(
            rows,
            "<tr><td class=\"n\">{}</td><td class=\"n\">{:.2e}</td><td class=\"text\">{text}</td><td><code>{}</code></td>\
             <td><code>{}</code></td></tr>",
            worst.record,
            worst.largest,
            escaped(expected),
            escaped(found)
        );
    }
    format!(
        "<div class=\"wide\"><table>\n<tr><th>record</th><th>largest |Δ|</th><th>text</th><th>answer of candle</th>\
         <th>answer of {}</th></tr>\n{rows}</table></div>\n",
        detail.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::Runtime;
    use crate::parity::detail::Worst;
    use crate::runtime::Provider;

    #[test]
    fn a_page_shows_what_differs_and_escapes_what_it_is_told() {
        let runtime = Runtime::Ort(Provider::Cpu);
        let compared = Compared::new(runtime, Runtime::Eager, &[vec![1.0]], &[vec![2.0]], 1e-4).unwrap();
        let detail = Detail {
            name: runtime.name(),
            layers: vec![
                Layer { tap: "a.b".to_owned(), largest: 1e-6, mean: 0.0 },
                Layer { tap: "a.<c>".to_owned(), largest: f32::NAN, mean: f64::NAN },
            ],
            histogram: [3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 1],
            worst: vec![Worst {
                record: 4,
                text: "<script>".repeat(90),
                largest: 1.0,
                answers: Some(("{\"label\":\"a\"}".to_owned(), "{\"label\":\"<b>\"}".to_owned())),
            }],
        };
        let about = About {
            title: "a<b".to_owned(),
            facts: vec![("tk", "0 & 1".to_owned())],
            lacking: vec![("ort-cuda", "no <GPU>".to_owned())],
        };
        let page = html(&about, &[compared], &[detail]);
        for part in [
            "a&lt;b",
            "0 &amp; 1",
            "no &lt;GPU&gt;",
            "DIFFERS",
            "runtimes differ",
            "&lt;b&gt;",
            "a.&lt;c&gt;",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(
            !page.contains("<script") && !page.contains("src=") && !page.contains("href="),
            "stands on its own"
        );
    }
}
