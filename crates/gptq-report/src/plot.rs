//! The page's two plots, as SVG. Colours come from the page's style sheet, by class.

use std::fmt::{self, Write};

use minijinja::HtmlEscape;

/// Number format of an axis.
type AxisFormat = fn(f64) -> String;

/// Drawing size and margins (left, right, top, bottom), in SVG units.
const SIZE: (f64, f64) = (440.0, 264.0);
const MARGIN: (f64, f64, f64, f64) = (58.0, 14.0, 12.0, 42.0);
/// Distance between a label and its dot above which a line joins them.
const NEAR: f64 = 10.0;
/// Approximate width of a label's character.
const CHARACTER: f64 = 6.2;

/// Maximum number of decades on a logarithmic axis with a tick each, and of ticks on any axis.
const DECADES: i32 = 8;
const TICKS: usize = 3 * (DECADES as usize + 1);

/// A point with a label.
pub(crate) struct Point {
    pub x: f64,
    pub y: f64,
    pub label: String,
    pub title: String,
}

/// A line of `(x, y, title)`; `class` is its style.
pub(crate) struct Series {
    pub class: &'static str,
    pub points: Vec<(f64, f64, String)>,
}

/// Mapping from values to positions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    /// Linear, with ticks at whole numbers only.
    Whole,
    /// Logarithmic; values must be positive.
    Log,
}

/// One direction of a plot.
struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
    /// Positions of `low` and `high`.
    ends: (f64, f64),
}

impl Scale {
    fn of(self, value: f64) -> f64 {
        match self {
            Scale::Log => value.ln(),
            Scale::Linear | Scale::Whole => value,
        }
    }
}

impl Axis {
    /// Builds an axis that spans the values with a small margin.
    fn new(values: impl Iterator<Item = f64>, scale: Scale, ends: (f64, f64)) -> Axis {
        let (low, high) = values
            .map(|v| scale.of(v))
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
                (l.min(v), h.max(v))
            });
        let span = high - low;
        let air = if span > 0.0 {
            0.08 * span
        } else {
            (0.05 * low.abs()).max(0.1)
        };
        Axis {
            low: low - air,
            high: high + air,
            scale,
            ends,
        }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (self.scale.of(value) - self.low) / (self.high - self.low);
        self.ends.0 + share * (self.ends.1 - self.ends.0)
    }

    /// Returns round values within the axis, at most a few dozen: 1, 2 and 5 times powers of ten,
    /// or every n-th power.
    fn ticks(&self) -> Vec<f64> {
        if self.scale == Scale::Log {
            let decade = |log: f64| (log / std::f64::consts::LN_10).clamp(-308.0, 308.0);
            let (first, last) = (
                decade(self.low).floor() as i32,
                decade(self.high).ceil() as i32,
            );
            let stride = ((last - first) / DECADES + 1).max(1);
            let decades = (first..=last).step_by(stride as usize);
            let pick = |steps: &[f64]| -> Vec<f64> {
                let all = decades
                    .clone()
                    .flat_map(|d| steps.iter().map(move |s| s * 10f64.powi(d)));
                let within = |v: &f64| (self.low..=self.high).contains(&v.ln());
                all.filter(within).take(TICKS).collect()
            };
            let few = pick(&[1.0]);
            return if few.len() > 2 {
                few
            } else {
                pick(&[1.0, 2.0, 5.0])
            };
        }
        let rough = match (self.high - self.low) / 5.0 {
            step if self.scale == Scale::Whole => step.max(1.0),
            step => step,
        };
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|s| s * power)
            .into_iter()
            .find(|&s| s >= rough)
            .unwrap_or(10.0 * power);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        let ticks = (first..=last).take(TICKS).map(|i| i as f64 * step);
        ticks.collect()
    }
}

/// Draws points with labels that do not overlap, and an optional reference level.
pub(crate) fn scatter(
    points: &[Point],
    level: Option<(f64, &str)>,
    names: (&str, &str),
    formats: (AxisFormat, AxisFormat),
) -> String {
    let (width, height) = SIZE;
    let (left, right, top, bottom) = MARGIN;
    let xs = points.iter().map(|p| p.x);
    let ys = points.iter().map(|p| p.y).chain(level.map(|(y, _)| y));
    let x = Axis::new(xs, Scale::Linear, (left, width - right));
    let y = Axis::new(ys, Scale::Linear, (height - bottom, top));
    svg(names, |svg| {
        axes(svg, (&x, &y), formats)?;
        let dots: Vec<(f64, f64)> = points.iter().map(|p| (x.at(p.x), y.at(p.y))).collect();
        let mut taken: Vec<[f64; 4]> = dots
            .iter()
            .map(|&(x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0])
            .collect();
        if let Some((value, name)) = level {
            let at = y.at(value);
            let end = width - right - 4.0;
            let text = CHARACTER * name.chars().count() as f64;
            taken.push([end - text, at + 3.0, end, at + 16.0]);
            write!(
                svg,
                "<path class=\"level\" d=\"M{left} {at:.1}H{:.1}\"/><text class=\"level\" x=\"{:.1}\" \
                 y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                width - right,
                end,
                at + 13.0,
                HtmlEscape(name)
            )?;
        }
        // From right to left, as space is shortest on the right.
        let mut order: Vec<usize> = (0..dots.len()).collect();
        order.sort_by(|&a, &b| dots[b].0.total_cmp(&dots[a].0));
        for (point, (px, py)) in order.into_iter().map(|i| (&points[i], dots[i])) {
            let w = CHARACTER * point.label.chars().count() as f64;
            let free = |b: &&[f64; 4]| inside(b) && taken.iter().all(|t| apart(b, t));
            // The label's own dot is the nearest one, within `slack`.
            let own = |b: &[f64; 4], slack: f64| {
                let least = distance(b, px, py) - slack;
                dots.iter().all(|&(x, y)| distance(b, x, y) >= least)
            };
            let places = places(px, py, w);
            let places = || places.iter().filter(free);
            let beside = places().find(|b| distance(b, px, py) <= NEAR && own(b, 0.0));
            let place = beside.or_else(|| places().find(|b| own(b, 3.0))).copied();
            write!(
                svg,
                "<circle class=\"dot\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"5\"><title>{}</title></circle>",
                HtmlEscape(&point.title)
            )?;
            // A label without space is left to the tooltip.
            if let Some(place) = place {
                taken.push(place);
                let (x, y) = (px.clamp(place[0], place[2]), py.clamp(place[1], place[3]));
                if distance(&place, px, py) > NEAR {
                    write!(
                        svg,
                        "<path class=\"leader\" d=\"M{px:.1} {py:.1}L{x:.1} {y:.1}\"/>"
                    )?;
                }
                write!(
                    svg,
                    "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    place[0],
                    place[3] - 3.0,
                    HtmlEscape(&point.label)
                )?;
            }
        }
        Ok(())
    })
}

/// Returns candidate boxes `[left, top, right, bottom]` for a label of width `w` around a dot, the
/// best first.
fn places(x: f64, y: f64, w: f64) -> Vec<[f64; 4]> {
    let sides = [9.0, -9.0 - w, -w / 2.0];
    let mut places = Vec::new();
    for dy in [0.0, -14.0, 14.0, -28.0, 28.0, -42.0, 42.0, -56.0] {
        for dx in sides {
            let (left, top) = (x + dx, y + dy - 7.0);
            places.push([left, top, left + w, top + 14.0]);
        }
    }
    places
}

fn inside(b: &[f64; 4]) -> bool {
    b[0] >= MARGIN.0 + 2.0 && b[1] >= 0.0 && b[2] <= SIZE.0 && b[3] <= SIZE.1 - MARGIN.3
}

/// Returns the distance from a point to a box.
fn distance(b: &[f64; 4], x: f64, y: f64) -> f64 {
    let dx = (b[0] - x).max(x - b[2]).max(0.0);
    let dy = (b[1] - y).max(y - b[3]).max(0.0);
    dx.hypot(dy)
}

fn apart(a: &[f64; 4], b: &[f64; 4]) -> bool {
    a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1]
}

/// Draws lines over an integer x with a logarithmic y; values that are not positive are left out.
pub(crate) fn lines(
    series: &[Series],
    names: (&str, &str),
    formats: (AxisFormat, AxisFormat),
) -> String {
    let (width, height) = SIZE;
    let (left, right, top, bottom) = MARGIN;
    let all = || series.iter().flat_map(|s| &s.points).filter(|p| p.1 > 0.0);
    if all().next().is_none() {
        return String::new();
    }
    let x = Axis::new(all().map(|p| p.0), Scale::Whole, (left, width - right));
    let y = Axis::new(all().map(|p| p.1), Scale::Log, (height - bottom, top));
    svg(names, |svg| {
        axes(svg, (&x, &y), formats)?;
        for line in series {
            write!(svg, "<g class=\"{}\"><path d=\"", line.class)?;
            let drawn = || line.points.iter().filter(|p| p.1 > 0.0);
            for (i, point) in drawn().enumerate() {
                let pen = if i == 0 { 'M' } else { 'L' };
                write!(svg, "{pen}{:.1} {:.1}", x.at(point.0), y.at(point.1))?;
            }
            svg.push_str("\"/>");
            for (px, py, title) in drawn() {
                write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}</title></circle>",
                    x.at(*px),
                    y.at(*py),
                    HtmlEscape(title)
                )?;
            }
            svg.push_str("</g>");
        }
        Ok(())
    })
}

/// Draws the frame that both plots share.
fn svg((x_name, y_name): (&str, &str), draw: impl FnOnce(&mut String) -> fmt::Result) -> String {
    let (width, height) = SIZE;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{} against {}\">",
        HtmlEscape(y_name),
        HtmlEscape(x_name)
    );
    draw(&mut svg).expect("writing to a string cannot fail");
    let (left, right, _, bottom) = MARGIN;
    write!(
        svg,
        "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>",
        (left + width - right) / 2.0,
        height - bottom + 36.0,
        HtmlEscape(x_name)
    )
    .expect("writing to a string cannot fail");
    svg
}

fn axes(
    svg: &mut String,
    (x, y): (&Axis, &Axis),
    formats: (AxisFormat, AxisFormat),
) -> fmt::Result {
    for tick in y.ticks() {
        let at = y.at(tick);
        write!(
            svg,
            "<path class=\"grid\" d=\"M{:.1} {at:.1}H{:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            x.ends.0,
            x.ends.1,
            x.ends.0 - 7.0,
            at + 4.0,
            HtmlEscape(&formats.1(tick))
        )?;
    }
    write!(
        svg,
        "<path class=\"axis\" d=\"M{:.1} {:.1}H{:.1}\"/>",
        x.ends.0, y.ends.0, x.ends.1
    )?;
    for tick in x.ticks() {
        write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x.at(tick),
            y.ends.0 + 17.0,
            HtmlEscape(&formats.0(tick))
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(value: f64) -> String {
        value.to_string()
    }

    #[test]
    fn ticks_are_round_and_lie_within_the_axis() {
        let axis = Axis::new([5.46, 6.82].into_iter(), Scale::Linear, (0.0, 100.0));
        let ticks = axis.ticks();
        assert!(ticks.len() >= 3, "{ticks:?}");
        assert!(ticks.iter().all(|t| (0.0..=100.0).contains(&axis.at(*t))));
        let log = Axis::new([1e-4, 3e-2].into_iter(), Scale::Log, (0.0, 100.0));
        assert_eq!(log.ticks(), [1e-4, 1e-3, 1e-2]);
        let layers = Axis::new([0.0, 2.0].into_iter(), Scale::Whole, (0.0, 100.0));
        assert_eq!(layers.ticks(), [0.0, 1.0, 2.0]);
    }

    #[test]
    fn ticks_are_few_whatever_the_values_are() {
        let ends = [
            (1e-30, 1e30),
            (5e-324, f64::MAX),
            (0.0, 5e-324),
            (-f64::MAX, f64::MAX),
            (1e300, 1e300),
            (0.0, f64::INFINITY),
            (f64::NAN, 1.0),
        ];
        for (low, high) in ends {
            for scale in [Scale::Linear, Scale::Whole, Scale::Log] {
                let axis = Axis::new([low, high].into_iter(), scale, (0.0, 100.0));
                let ticks = axis.ticks();
                assert!(ticks.len() <= TICKS, "{low} to {high}: {}", ticks.len());
            }
        }
        let wide = Axis::new([1e-20, 1e20].into_iter(), Scale::Log, (0.0, 100.0));
        let ticks = wide.ticks();
        assert!((4..=9).contains(&ticks.len()), "{ticks:?}");
    }

    #[test]
    fn labels_keep_apart_and_are_escaped() {
        let point = |label: &str| Point {
            x: 1.0,
            y: 1.0,
            label: label.into(),
            title: "a\"b".into(),
        };
        let drawn = scatter(
            &[point("<one>"), point("two")],
            Some((2.0, "dense")),
            ("size", "perplexity"),
            (plain, plain),
        );
        assert!(
            drawn.contains("&lt;one&gt;") && drawn.contains("a&quot;b"),
            "{drawn}"
        );
        let places: Vec<&str> = drawn.split("class=\"label\" ").skip(1).collect();
        assert_eq!(places.len(), 2);
        assert_ne!(places[0].split('>').next(), places[1].split('>').next());
    }

    #[test]
    fn a_line_without_a_positive_value_is_not_drawn() {
        let zero = Series {
            class: "own",
            points: vec![(0.0, 0.0, String::new())],
        };
        assert_eq!(lines(&[zero], ("layer", "error"), (plain, plain)), "");
    }
}
