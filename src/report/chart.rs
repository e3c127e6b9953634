//! Numbers → drawings in SVG, which take their colours from the page: see [`STYLE`].

use plotters::coord::Shift;
use plotters::prelude::*;

use super::history::Point;
use crate::Result;
use crate::html::escaped;
use crate::task::review::Calibration;

/// Units of a drawing; it is as wide as the page lets it.
const SIZE: (u32, u32) = (520, 280);
/// The most places along a curve, of each of which its lowest and its highest number are drawn.
const PLACES: usize = 400;
/// Numbers beyond it are marked, but not drawn to scale.
const LARGEST: f64 = 1e30;
/// The most points of a cloud.
const CLOUD: usize = 2000;

// the colours of the page in the light, and what they are told by in the dark
const TEXT: RGBColor = RGBColor(0x5c, 0x66, 0x70);
const LINE: RGBColor = RGBColor(0xd8, 0xdd, 0xe2);
const FIRST: RGBColor = RGBColor(0x0b, 0x62, 0xc4);
const SECOND: RGBColor = RGBColor(0xb3, 0x5c, 0x00);
const BAD: RGBColor = RGBColor(0xc4, 0x23, 0x2b);

/// Gives the drawings' colours their names in the page.
pub const STYLE: &str = "\
svg text { font-size: 15px; } svg [fill=\"#5C6670\" i] { fill: var(--soft); } svg [stroke=\"#5C6670\" i] { stroke: var(--soft); }
svg [stroke=\"#D8DDE2\" i] { stroke: var(--line); } svg [fill=\"#0B62C4\" i] { fill: var(--first); }
svg [stroke=\"#0B62C4\" i] { stroke: var(--first); } svg [stroke=\"#B35C00\" i] { stroke: var(--second); }
svg [fill=\"#B35C00\" i] { fill: var(--second); } svg [fill=\"#C4232B\" i] { fill: var(--bad); }
svg [stroke=\"#C4232B\" i] { stroke: var(--bad); }";

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// As it is.
    Plain,
    /// Faint, with its moving mean.
    Smoothed,
    /// With a dot at every point.
    Dotted,
}

/// A curve over the steps from 1 to `last`; `told` describes it to who can't see it. None without a number.
///
/// # Errors
/// It can't be drawn.
pub fn curve(points: &[Point], line: Line, last: u64, told: &str) -> Result<Option<String>> {
    let drawable = |value: f64| value.is_finite() && value.abs() <= LARGEST;
    let finite: Vec<(f64, f64)> = points
        .iter()
        .filter(|(_, value)| drawable(*value))
        .map(|&(step, value)| (step as f64, value))
        .collect();
    let marked: Vec<f64> =
        points.iter().filter(|(_, value)| !drawable(*value)).map(|(step, _)| *step as f64).collect();
    if points.is_empty() {
        return Ok(None);
    }
    let steps = (0.0, (last as f64).max(1.0));
    let (low, high) = padded(finite.iter().map(|(_, value)| *value));
    let svg = drawn(told, |area| {
        let mut chart = plane(&area, steps.0..steps.1, low..high, None)?;
        let is_smoothed = line == Line::Smoothed && finite.len() > SMOOTH_FROM;
        let thin = thinned(&finite, PLACES);
        let raw = if is_smoothed { FIRST.mix(0.35).stroke_width(1) } else { FIRST.stroke_width(2) };
        chart.draw_series(LineSeries::new(thin.iter().copied(), raw))?;
        if is_smoothed {
            let smooth = thinned(&smoothed(&finite), PLACES);
            chart.draw_series(LineSeries::new(smooth, FIRST.stroke_width(2)))?;
        }
        if line == Line::Dotted || finite.len() == 1 {
            chart.draw_series(thin.iter().map(|&at| Circle::new(at, 4, FIRST.filled())))?;
        }
        let width = (steps.1 - steps.0) / PLACES as f64;
        let mut shown = f64::NEG_INFINITY;
        let marks = marked.iter().copied().filter(|&step| {
            let is_new = step >= shown + width; // others would fall on the same place
            if is_new {
                shown = step;
            }
            is_new
        });
        chart.draw_series(marks.map(|step| Cross::new((step, high), 5, BAD.stroke_width(2))))?;
        Ok(())
    })?;
    Ok(Some(svg))
}

/// Fewer numbers are not smoothed.
const SMOOTH_FROM: usize = 20;

/// The numbers' exponential mean, whose memory is a fortieth of them; without a bias at the start.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 40.0).max(4.0);
    let (mut mean, mut weight) = (0.0, 0.0);
    let next = |&(step, value): &(f64, f64)| {
        mean = keep * mean + (1.0 - keep) * value;
        weight = keep * weight + (1.0 - keep);
        (step, mean / weight)
    };
    points.iter().map(next).collect()
}

/// Of many points the first, the lowest, the highest and the last of each of so many places.
fn thinned(points: &[(f64, f64)], places: usize) -> Vec<(f64, f64)> {
    if points.len() <= 4 * places {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(4 * places);
    for part in points.chunks(points.len().div_ceil(places)) {
        let by = |a: &(usize, &(f64, f64)), b: &(usize, &(f64, f64))| a.1.1.total_cmp(&b.1.1);
        let ends = [part.iter().enumerate().min_by(by), part.iter().enumerate().max_by(by)];
        let mut at: Vec<usize> = ends.into_iter().flatten().map(|(i, _)| i).collect();
        at.extend([0, part.len() - 1]);
        at.sort_unstable();
        at.dedup();
        kept.extend(at.into_iter().map(|i| part[i]));
    }
    kept
}

/// A range that holds numbers, with some room around it.
fn padded(numbers: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    if low > high {
        return (0.0, 1.0);
    }
    let size = low.abs().max(high.abs());
    let room = match high - low {
        _ if size < f64::MIN_POSITIVE => 1.0,
        // all the same: an axis has no numbers so near to each other
        apart if apart < size * 1e-9 => size * 0.1,
        apart => apart * 0.06,
    };
    // nothing is below zero where nothing was
    (if low >= 0.0 { (low - room).max(0.0) } else { low - room }, high + room)
}

/// How often predictions are right, by the probability that they were given.
///
/// # Errors
/// It can't be drawn.
pub fn reliability(calibration: &Calibration, told: &str) -> Result<String> {
    drawn(told, |area| {
        let mut chart = plane(&area, 0.0..1.0, 0.0..1.0, Some(("probability", "share that is right")))?;
        let width = 1.0 / calibration.bins.len() as f64;
        let filled = calibration.bins.iter().enumerate().filter(|(_, bin)| bin.count > 0);
        chart.draw_series(filled.clone().map(|(i, bin)| {
            let left = i as f64 * width;
            Rectangle::new(
                [(left + 0.08 * width, 0.0), (left + 0.92 * width, bin.accuracy)],
                FIRST.mix(0.55).filled(),
            )
        }))?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], TEXT.stroke_width(1)))?;
        chart.draw_series(
            filled.map(|(_, bin)| Circle::new((bin.confidence, bin.accuracy), 4, SECOND.filled())),
        )?;
        Ok(())
    })
}

/// What was wanted and what was predicted, as a cloud of points.
///
/// # Errors
/// It can't be drawn.
pub fn cloud(numbers: &[(f64, f64)], told: &str) -> Result<String> {
    let is_drawn = |(a, b): &&(f64, f64)| [a, b].iter().all(|x| x.is_finite() && x.abs() <= LARGEST);
    let drawn_ones: Vec<(f64, f64)> = numbers.iter().filter(is_drawn).copied().collect();
    let (low, high) = padded(drawn_ones.iter().flat_map(|&(a, b)| [a, b]));
    drawn(told, |area| {
        let mut chart = plane(&area, low..high, low..high, Some(("wanted", "predicted")))?;
        chart.draw_series(LineSeries::new([(low, low), (high, high)], TEXT.stroke_width(1)))?;
        let every = drawn_ones.len().div_ceil(CLOUD).max(1);
        let points = drawn_ones.iter().step_by(every);
        chart.draw_series(points.map(|&at| Circle::new(at, 3, FIRST.mix(0.5).filled())))?;
        Ok(())
    })
}

type Plane<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// A plane whose axes have names, across and up; or none, and no lines at the places across.
fn plane<'a, 'b>(
    area: &'a DrawingArea<SVGBackend<'b>, Shift>,
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
    names: Option<(&str, &str)>,
) -> Result<Plane<'a, 'b>> {
    let (below, beside) = if names.is_some() { (46, 72) } else { (26, 62) };
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_right(18)
        .x_label_area_size(below)
        .y_label_area_size(beside)
        .build_cartesian_2d(x, y)
        .map_err(told_of)?;
    let grid = LINE.stroke_width(1);
    let text = || ("sans-serif", 15).into_font().color(&TEXT);
    let (across, up) = (|x: &f64| short(*x), |y: &f64| short(*y));
    let mut mesh = chart.configure_mesh();
    mesh.x_labels(6)
        .y_labels(6)
        .bold_line_style(grid)
        .light_line_style(TRANSPARENT)
        .axis_style(grid)
        .label_style(text())
        .x_label_formatter(&across)
        .y_label_formatter(&up);
    match names {
        Some((across, up)) => mesh.axis_desc_style(text()).x_desc(across).y_desc(up),
        None => mesh.disable_x_mesh(),
    };
    mesh.draw().map_err(told_of)?;
    Ok(chart)
}

/// What `draw` puts on an empty area, as an element of a page.
fn drawn(
    told: &str,
    draw: impl FnOnce(DrawingArea<SVGBackend, Shift>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw(area).map_err(told_of)?;
    }
    // its own size and address of a definition, which a page needs neither of
    let inside = svg.split_once('>').map_or("", |(_, inside)| inside);
    let (width, height) = SIZE;
    Ok(format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">{}",
        escaped(told),
        inside.replace('\n', "")
    ))
}

fn told_of(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("drawing: {error}")
}

/// A number at an axis.
fn short(x: f64) -> String {
    let size = x.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{x:.1e}").replace(".0e", "e")
    } else {
        // axes go by round numbers, which have few digits
        let text = format!("{x:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_extremes_and_ends() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        points[50_001].1 = 99.0;
        points[70_001].1 = -99.0;
        let thin = thinned(&points, 400);
        assert!(thin.len() <= 1600, "{}", thin.len());
        assert_eq!((thin[0], thin[thin.len() - 1]), (points[0], points[99_999]));
        assert!(thin.contains(&(50_001.0, 99.0)) && thin.contains(&(70_001.0, -99.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thinned(&points[..1000], 400), points[..1000]);
    }

    #[test]
    fn what_is_not_finite_is_marked_and_everything_stays_in_bounds() {
        let points = [(1, 0.5), (2, f64::NAN), (3, 1e300), (400, 0.25), (u64::MAX, 0.1)];
        let svg = curve(&points, Line::Smoothed, u64::MAX, "the \"loss\"").unwrap().unwrap();
        assert!(svg.contains("aria-label=\"the &quot;loss&quot;\""), "{svg}");
        assert!(
            svg.to_lowercase().contains("#c4232b") && !svg.contains("http") && !svg.contains("NaN"),
            "{svg}"
        );
        assert!(svg.ends_with("</svg>"), "{svg}");
        let only = curve(&[(5, f64::NAN)], Line::Plain, 5, "").unwrap().unwrap();
        assert!(only.to_lowercase().contains("#c4232b"));
        assert!(curve(&[], Line::Plain, 5, "").unwrap().is_none());
        for value in [0.0, -3.0, 1e-300, 1e30] {
            let svg = curve(&[(7, value)], Line::Dotted, 7, "").unwrap().unwrap();
            assert!(svg.contains("<circle"), "{value}: {svg}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
        #[test]
        fn whatever_was_logged_is_drawn(
            points in proptest::collection::vec(proptest::num::f64::ANY, 1..40),
            near in proptest::collection::vec(0u64..20, 1..40),
            around in proptest::num::f64::NORMAL,
            last in proptest::num::u64::ANY,
        ) {
            // numbers that differ in their last bits
            let near: Vec<f64> = near.into_iter().map(|bits| f64::from_bits(around.to_bits() ^ bits)).collect();
            for values in [&points, &near] {
                let points: Vec<Point> = (1..).zip(values.iter().copied()).collect();
                for line in [Line::Plain, Line::Smoothed, Line::Dotted] {
                    let svg = curve(&points, line, last, "x").unwrap().unwrap();
                    assert!(svg.len() < 1_000_000 && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                }
                let pairs: Vec<(f64, f64)> = values.iter().map(|&x| (x, around)).collect();
                cloud(&pairs, "x").unwrap();
            }
        }
    }

    #[test]
    fn smoothing_begins_at_the_first_number_and_keeps_a_constant() {
        let points: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i), 3.0)).collect();
        assert!(smoothed(&points).iter().all(|(_, value)| (value - 3.0).abs() < 1e-9));
    }

    #[test]
    fn numbers_at_axes_are_short() {
        let found = [0.0, 0.25, 1200.0, 2e-5, 3e6, 1.5e7].map(short);
        assert_eq!(found, ["0", "0.25", "1200", "2e-5", "3e6", "1.5e7"]);
    }
}
