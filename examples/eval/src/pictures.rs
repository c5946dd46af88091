//! Pictures of results: curves as SVG, what a policy kept as SVG and as coloured text.

use crate::{Error, Result, report};
use plotters::{
    coord::{
        Shift,
        ranged1d::{DefaultFormatting, KeyPointHint},
    },
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{fmt::Write, ops::Range, path::Path};

/// A line of a picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// Points in the order of `x`; a single one is drawn as a mark alone.
    pub points: Vec<(f64, f64)>,
    /// Whether a line goes through the points, or they are marks alone.
    pub joined: bool,
}

/// How an axis counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Plain numbers from 0.
    Linear,
    /// Plain numbers, from the smallest to the largest.
    Near,
    /// Shares from 0 to 1.
    Share,
    /// Bytes from 0.
    Bytes,
    /// Bytes, every power of two as far as the last.
    LogBytes,
}

/// A picture with two axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What `x` is.
    pub x: (String, Scale),
    /// What `y` is.
    pub y: (String, Scale),
    /// The lines.
    pub series: Vec<Series>,
}

/// Colours that people with colour-blindness can tell apart (Okabe and Ito, 2008), without the
/// yellow that is hardly seen on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

const MIB: f64 = (1u32 << 20) as f64;
const WIDTH: u32 = 900;
const HEIGHT: u32 = 480;
const LEGEND: u32 = 240;

impl Chart {
    /// The picture as SVG.
    ///
    /// # Errors
    /// [`Error::Picture`] if there is nothing to draw, or a point that is not finite.
    pub fn svg(&self) -> Result<String> {
        let all = || self.series.iter().flat_map(|s| &s.points);
        if all().next().is_none() {
            return Err(Error::Picture(format!("{}: no points", self.title)));
        }
        if all().any(|(x, y)| !x.is_finite() || !y.is_finite()) {
            return Err(Error::Picture(format!(
                "{}: a point is not finite",
                self.title
            )));
        }
        let mut svg = String::new();
        self.draw(&mut svg)
            .map_err(|e| Error::Picture(format!("{}: {e}", self.title)))?;
        Ok(svg)
    }

    /// Writes [`Chart::svg`] to a file.
    ///
    /// # Errors
    /// As [`Chart::svg`], and [`Error::Write`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let svg = self.svg()?;
        crate::files::write_atomically(path, |out| out.write_all(svg.as_bytes()))
    }

    fn draw(&self, svg: &mut String) -> Result<(), String> {
        let root = SVGBackend::with_string(svg, (WIDTH, HEIGHT)).into_drawing_area();
        root.fill(&WHITE).map_err(text)?;
        let title = ("sans-serif", 17).into_font().color(&BLACK);
        let root = root.titled(&self.title, title).map_err(text)?;
        let (left, right) = root.split_horizontally(WIDTH - LEGEND);
        let points = || self.series.iter().flat_map(|s| &s.points);
        let (x, y) = (self.x.1, self.y.1);
        let axis = ("sans-serif", 13).into_font();
        let (across, up) = (
            x.range(points().map(|p| p.0)),
            y.range(points().map(|p| p.1)),
        );
        let (x_ticks, y_ticks) = (x.ticks(&across), y.ticks(&up));
        let mut chart = ChartBuilder::on(&left)
            .margin(8)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(
                Axis {
                    range: across,
                    ticks: x_ticks,
                },
                Axis {
                    range: up,
                    ticks: y_ticks,
                },
            )
            .map_err(text)?;
        chart
            .configure_mesh()
            .x_desc(&self.x.0)
            .y_desc(&self.y.0)
            .x_label_formatter(&|v| x.label(*v))
            .y_label_formatter(&|v| y.label(*v))
            .axis_desc_style(axis.clone())
            .label_style(axis)
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()
            .map_err(text)?;
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let place = |p: &(f64, f64)| (x.place(p.0), y.place(p.1));
            let points: Vec<(f64, f64)> = series.points.iter().map(place).collect();
            // Curves of many points need no marks.
            let marked = if points.len() <= 24 { &points[..] } else { &[] };
            let marks: Vec<_> = marked.iter().map(|p| mark(i, *p, colour)).collect();
            if series.joined {
                let line = PathElement::new(points, stroke(i, colour));
                chart.draw_series([line]).map_err(text)?;
            }
            chart.draw_series(marks).map_err(text)?;
        }
        self.legend(&right)?;
        root.present().map_err(text)
    }

    fn legend(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), String> {
        let style = ("sans-serif", 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Left, VPos::Center));
        for (i, series) in self.series.iter().enumerate() {
            let y = 20 + 20 * i as i32;
            let colour = COLOURS[i % COLOURS.len()];
            if series.joined {
                let line = PathElement::new(vec![(4, y), (28, y)], stroke(i, colour));
                area.draw(&line).map_err(text)?;
            }
            let name = Text::new(series.name.as_str(), (36, y), style.clone());
            area.draw(&mark(i, (16, y), colour)).map_err(text)?;
            area.draw(&name).map_err(text)?;
        }
        Ok(())
    }
}

/// An axis with equal steps that has its numbers where it is told to.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            Vec::new()
        } else {
            self.ticks.clone()
        }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Scale {
    /// Where a value stands on an axis with equal steps.
    fn place(self, value: f64) -> f64 {
        match self {
            Self::LogBytes => value.max(1.0).log2(),
            // So that ticks are at round numbers of MiB.
            Self::Bytes => value / MIB,
            _ => value,
        }
    }

    fn range(self, values: impl Iterator<Item = f64>) -> Range<f64> {
        let places = values.map(|v| self.place(v));
        let (low, high) = places.fold((f64::INFINITY, 1e-9f64), |(a, b), v| (a.min(v), b.max(v)));
        match self {
            Self::Share => 0.0..1.0,
            Self::LogBytes => low.floor()..(high.ceil().max(low.floor() + 1.0)),
            Self::Linear | Self::Bytes => 0.0..high * 1.05,
            Self::Near => {
                // A twentieth more on both sides, and never nothing.
                let room = ((high - low) / 20.0).max(1e-3);
                low - room..high + room
            }
        }
    }

    /// Where an axis has its numbers.
    fn ticks(self, range: &Range<f64>) -> Vec<f64> {
        let step = match self {
            Self::LogBytes => 1.0,
            Self::Share => 0.2,
            Self::Linear | Self::Bytes | Self::Near => {
                // The round number next above an eighth of the axis.
                let least = (range.end - range.start) / 8.0;
                let power = 10f64.powf(least.log10().floor());
                let round = [1.0, 2.0, 5.0, 10.0].map(|n| n * power);
                round.into_iter().find(|n| *n >= least).unwrap_or(least)
            }
        };
        let first = match self {
            Self::Near => (range.start / step).ceil() * step,
            _ => range.start,
        };
        let count = ((range.end - first) / step + 1e-6) as usize;
        (0..=count).map(|i| first + i as f64 * step).collect()
    }

    fn label(self, place: f64) -> String {
        let value = match self {
            Self::LogBytes => place.exp2(),
            Self::Bytes => place * MIB,
            _ => place,
        };
        match self {
            Self::Linear | Self::Near => {
                if value >= 1000.0 {
                    report::grouped(value.round() as usize)
                } else {
                    format!("{}", (value * 1000.0).round() / 1000.0)
                }
            }
            Self::Share => format!("{:.0} %", value * 100.0),
            Self::Bytes | Self::LogBytes => {
                // Whole numbers need no decimals on an axis.
                report::bytes(value.max(0.0).round() as usize)
                    .replace(".00 ", " ")
                    .replace(".0 ", " ")
            }
        }
    }
}

/// After seven lines the colours come again, with thinner strokes.
fn stroke(index: usize, colour: RGBColor) -> ShapeStyle {
    colour.stroke_width(if index < COLOURS.len() { 2 } else { 1 })
}

/// Three shapes, so that lines of one colour and neighbours in the legend differ.
fn mark<DB: DrawingBackend, C: Clone + 'static>(
    index: usize,
    at: C,
    colour: RGBColor,
) -> DynElement<'static, DB, C>
where
    Circle<C, i32>: IntoDynElement<'static, DB, C>,
    TriangleMarker<C, i32>: IntoDynElement<'static, DB, C>,
    Cross<C, i32>: IntoDynElement<'static, DB, C>,
{
    match index % 3 {
        0 => Circle::new(at, 4, colour.filled()).into_dyn(),
        1 => TriangleMarker::new(at, 5, colour.filled()).into_dyn(),
        _ => Cross::new(at, 4, colour.stroke_width(2)).into_dyn(),
    }
}

/// For one prompt, how many KV heads of each layer kept each position: `kept[layer][head]` has
/// ascending positions below `tokens`.
///
/// Positions are gathered in columns; a cell's darkness is the share of (position, head) pairs in
/// it that were kept.
pub fn kept_map(title: &str, kept: &[Vec<Vec<u32>>], tokens: usize) -> String {
    const COLUMNS: usize = 180;
    const CELL: (usize, usize) = (4, 10);
    const LEVELS: usize = 8;
    const LEFT: usize = 58;
    const TOP: usize = 34;
    let layers = kept.len();
    let columns = tokens.clamp(1, COLUMNS);
    let column = |p: u32| (p as usize * columns / tokens.max(1)).min(columns - 1);
    let mut width_of = vec![0usize; columns];
    for p in 0..tokens {
        width_of[column(p as u32)] += 1;
    }
    let (w, h) = (columns * CELL.0, layers * CELL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} \
         {1}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"#fff\"/>\n<text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{2}</text>\n",
        LEFT + w + 16,
        TOP + h + 62,
        escape(title),
    );
    // One path for each level keeps the file small.
    let mut paths = vec![String::new(); LEVELS + 1];
    for (layer, heads) in kept.iter().enumerate() {
        let mut counts = vec![0usize; columns];
        for p in heads.iter().flatten() {
            counts[column(*p)] += 1;
        }
        let level = |c: usize| {
            let share = counts[c] as f64 / (width_of[c] * heads.len().max(1)).max(1) as f64;
            // Something kept is never shown as nothing.
            (share * LEVELS as f64).ceil() as usize
        };
        let mut from = 0;
        while from < columns {
            let l = level(from);
            let to = (from..columns).find(|c| level(*c) != l).unwrap_or(columns);
            if l > 0 {
                let (x, y) = (LEFT + from * CELL.0, TOP + layer * CELL.1);
                let (dx, dy) = ((to - from) * CELL.0, CELL.1 - 1);
                // Writing to a string cannot fail.
                let _ = write!(paths[l.min(LEVELS)], "M{x} {y}h{dx}v{dy}h-{dx}z");
            }
            from = to;
        }
    }
    for (l, path) in paths.iter().enumerate().skip(1).filter(|p| !p.1.is_empty()) {
        let _ = writeln!(svg, "<path fill=\"{}\" d=\"{path}\"/>", shade(l, LEVELS));
    }
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{w}\" height=\"{h}\" fill=\"none\" \
         stroke=\"#999\"/>"
    );
    for layer in (0..layers).step_by(layers.div_ceil(6).max(1)) {
        let y = TOP + layer * CELL.1 + CELL.1;
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{layer}</text>",
            LEFT - 6
        );
    }
    let middle = TOP + h / 2;
    let _ = writeln!(
        svg,
        "<text x=\"16\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 16 \
         {middle})\">layer</text>"
    );
    for i in 0..=4 {
        let (x, anchor) = (
            LEFT + i * w / 4,
            ["start", "middle", "middle", "middle", "end"][i],
        );
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
            TOP + h + 16,
            report::grouped(i * tokens / 4)
        );
    }
    let y = TOP + h + 34;
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{}\">position in the text; share of heads that kept it:</text>",
        y + 10
    );
    for l in 1..=LEVELS {
        let x = LEFT + 300 + (l - 1) * 26;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"26\" height=\"12\" fill=\"{}\"/>",
            shade(l, LEVELS)
        );
    }
    let end = LEFT + 300 + LEVELS * 26 + 6;
    let _ = writeln!(svg, "<text x=\"{end}\" y=\"{}\">all</text>\n</svg>", y + 10);
    svg
}

/// From a pale to a dark blue.
fn shade(level: usize, levels: usize) -> String {
    let share = (level as f64 / levels as f64).clamp(0.0, 1.0);
    let mix = |from: f64, to: f64| (from + (to - from) * share).round() as u8;
    format!(
        "#{:02x}{:02x}{:02x}",
        mix(222.0, 8.0),
        mix(235.0, 48.0),
        mix(247.0, 107.0)
    )
}

/// A page with the map of [`kept_map`] and below it the text, each token coloured by the share of
/// (layer, KV head) pairs in which its unit was kept. `pieces` has the text of each token; `share`
/// one number from 0 to 1 for each.
pub fn survival_page(
    title: &str,
    note: &str,
    map: &str,
    pieces: &[String],
    share: &[f64],
) -> String {
    const LEVELS: usize = 10;
    let mut page = String::from("<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n");
    let _ = writeln!(page, "<title>{}</title>", escape(title));
    page += "<style>\n\
        body{font:16px/1.6 Georgia,serif;max-width:52em;margin:2em auto;padding:0 1em;\
        color:#111;background:#fff}\n\
        h1{font:600 1.3em sans-serif}p.note{font:14px sans-serif;color:#444}\n\
        div.text{white-space:pre-wrap;overflow-wrap:anywhere}\n\
        span{border-radius:2px}svg{max-width:100%;height:auto}\n";
    for l in 0..=LEVELS {
        let back = if l == 0 {
            "#fff".into()
        } else {
            shade(l, LEVELS)
        };
        let front = match l {
            0 => "#8c8c8c",
            1..=5 => "#111",
            _ => "#fff",
        };
        let _ = writeln!(page, ".s{l}{{background:{back};color:{front}}}");
    }
    let _ = writeln!(
        page,
        "</style>\n<h1>{}</h1>\n<p class=\"note\">{}</p>\n{map}<p class=\"note\">Kept in",
        escape(title),
        escape(note)
    );
    for l in (0..=LEVELS).step_by(2) {
        let _ = write!(
            page,
            " <span class=\"s{l}\">&nbsp;{} %&nbsp;</span>",
            l * 100 / LEVELS
        );
    }
    page += " of all layers and heads</p>\n<div class=\"text\">";
    let level = |i: usize| {
        let share = share.get(i).copied().unwrap_or(0.0).clamp(0.0, 1.0);
        // Something kept is never shown as nothing.
        (share * LEVELS as f64).ceil() as usize
    };
    let mut from = 0;
    while from < pieces.len() {
        let l = level(from);
        let to = (from..pieces.len()).find(|i| level(*i) != l);
        let to = to.unwrap_or(pieces.len());
        let text = escape(&pieces[from..to].concat());
        if !text.is_empty() {
            let _ = write!(page, "<span class=\"s{l}\">{text}</span>");
        }
        from = to;
    }
    page += "</div>\n</html>\n";
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(x: Scale) -> Chart {
        let series = |k: usize| Series {
            name: format!("policy <{k}>"),
            points: (1..5)
                .map(|i| (f64::from(i) * 1e6, 0.2 * f64::from(i) / (k + 1) as f64))
                .collect(),
            joined: k.is_multiple_of(2),
        };
        Chart {
            title: "Quality & bytes".into(),
            x: ("bytes kept".into(), x),
            y: ("exact match".into(), Scale::Share),
            series: (0..9).map(series).collect(),
        }
    }

    #[test]
    fn charts_name_every_series_and_stay_small() {
        for x in [Scale::LogBytes, Scale::Bytes, Scale::Linear, Scale::Near] {
            let svg = chart(x).svg().unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            for k in 0..9 {
                assert!(svg.contains(&format!("policy &lt;{k}&gt;")), "{svg}");
            }
            assert!(svg.len() < 100_000, "{}", svg.len());
        }
    }

    #[test]
    fn axes_have_round_numbers() {
        let near = Scale::Near.range([3.02, 3.37].into_iter());
        assert!((3.0..3.02).contains(&near.start) && (3.37..3.4).contains(&near.end));
        let ticks = Scale::Near.ticks(&near);
        let labels: Vec<String> = ticks.iter().map(|t| Scale::Near.label(*t)).collect();
        assert_eq!(
            labels,
            ["3.05", "3.1", "3.15", "3.2", "3.25", "3.3", "3.35"]
        );
        assert!(!Scale::Near.range([2.0, 2.0].into_iter()).is_empty());
        assert_eq!(
            Scale::LogBytes.ticks(&(20.0..23.0)),
            [20.0, 21.0, 22.0, 23.0]
        );
        let labels = |scale: Scale, to: f64| -> Vec<String> {
            let ticks = scale.ticks(&(0.0..to)).into_iter();
            ticks.map(|t| scale.label(t)).collect()
        };
        assert_eq!(
            labels(Scale::Share, 1.0),
            ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
        );
        assert_eq!(
            labels(Scale::Linear, 2100.0),
            ["0", "500", "1,000", "1,500", "2,000"]
        );
        assert_eq!(labels(Scale::Bytes, 13.0).len(), 7);
        assert!(labels(Scale::Linear, 1e-9).len() > 1);
    }

    #[test]
    fn charts_without_finite_points_are_errors() {
        let mut empty = chart(Scale::Linear);
        empty.series.clear();
        assert!(matches!(empty.svg(), Err(Error::Picture(_))));
        let mut bad = chart(Scale::Linear);
        bad.series[0].points[0].1 = f64::NAN;
        assert!(matches!(bad.svg(), Err(Error::Picture(_))));
    }

    #[test]
    fn a_map_shows_each_layer_and_what_was_kept() {
        // Layer 0 keeps everything, layer 1 every other head's last quarter, layer 2 nothing.
        let tokens = 720;
        let all: Vec<u32> = (0..tokens as u32).collect();
        let kept = vec![
            vec![all.clone(), all.clone()],
            vec![all[540..].to_vec(), Vec::new()],
            vec![Vec::new(), Vec::new()],
        ];
        let svg = kept_map("a <b>", &kept, tokens);
        assert!(svg.contains("a &lt;b&gt;"));
        // One run over the whole first layer, one over the last quarter of the second.
        assert!(svg.contains("M58 34h720v9h-720z"), "{svg}");
        assert!(svg.contains("M598 44h180v9h-180z"), "{svg}");
        assert_eq!(svg.matches("<path").count(), 2);
    }

    #[test]
    fn a_page_escapes_the_text_and_merges_equal_neighbours() {
        let pieces = ["<a", "> ", "b&c", "\n"].map(String::from);
        let page = survival_page("t", "n", "<svg></svg>\n", &pieces, &[0.0, 0.0, 1.0, 0.01]);
        let expected = "<span class=\"s0\">&lt;a&gt; </span><span class=\"s10\">b&amp;c</span>\
                        <span class=\"s1\">\n</span></div>";
        assert!(page.contains(expected), "{page}");
    }
}
