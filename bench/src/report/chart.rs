//! The report as a bar chart, for pages: SVG that needs nothing else, and is read on white and on black.

use std::fmt::Write;

use super::{Report, Row};

const WIDTH: f64 = 860.0;
/// Where bars begin; names are to the left of it.
const LEFT: f64 = 230.0;
/// Room for the numbers behind the longest bar.
const RIGHT: f64 = 130.0;
const TOP: f64 = 56.0;
const ROW: f64 = 36.0;
const BAR: f64 = 12.0;

/// Two bars for each scenario, xlb's and the floor's, with the outermost rounds as a line.
pub fn draw(report: &Report) -> String {
    let rows = &report.rows;
    let height = TOP + ROW * rows.len() as f64 + 28.0;
    let longest = rows
        .iter()
        .flat_map(|row| [row.xlb_ns.max, row.floor_ns.max])
        .fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let machine = escaped(&format!(
        "{}, Linux {}, median of {} rounds; lines: outermost rounds",
        report.machine.processor, report.machine.kernel, report.rounds
    ));
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" font-size="12">
<title>Nanoseconds for each packet</title>
<style>text {{ fill: #1f2328 }} .xlb {{ fill: #3b82d0 }} .floor {{ fill: #9aa4b0 }} .spread {{ stroke: #1f2328; stroke-width: 1.2 }} @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .spread {{ stroke: #e6edf3 }} }}</style>
<text x="{LEFT}" y="18" font-size="14" font-weight="600">Nanoseconds for each packet, one processor</text>
<rect class="xlb" x="{LEFT}" y="28" width="{BAR}" height="{BAR}"/><text x="{xlb}" y="38">xlb</text>
<rect class="floor" x="{floor_box}" y="28" width="{BAR}" height="{BAR}"/><text x="{floor}" y="38">floor: what it costs at least</text>
"##,
        xlb = LEFT + 18.0,
        floor_box = LEFT + 60.0,
        floor = LEFT + 78.0,
    );
    for (number, row) in rows.iter().enumerate() {
        let y = TOP + ROW * number as f64;
        let name = escaped(&row.name);
        // Writing to a String does not fail.
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{name}</text>"#,
            LEFT - 10.0,
            y + BAR + 4.0
        );
        bars(&mut svg, row, y, scale);
    }
    let _ = write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-size=\"10\">{machine}</text>\n</svg>\n",
        height - 10.0
    );
    svg
}

fn bars(svg: &mut String, row: &Row, y: f64, scale: f64) {
    let both = [
        (
            "xlb",
            y,
            row.xlb_ns,
            format!("{:.0} ({:.1}×)", row.xlb_ns.median, row.ratio.median),
        ),
        (
            "floor",
            y + BAR + 1.0,
            row.floor_ns,
            format!("{:.0}", row.floor_ns.median),
        ),
    ];
    for (class, y, summary, label) in both {
        let at = |value: f64| LEFT + value.max(0.0) * scale;
        let middle = y + BAR / 2.0;
        let _ = writeln!(
            svg,
            r#"<rect class="{class}" x="{LEFT}" y="{y:.1}" width="{:.1}" height="{BAR}"/><line class="spread" x1="{:.1}" x2="{:.1}" y1="{middle:.1}" y2="{middle:.1}"/><text x="{:.1}" y="{:.1}" font-size="11">{label}</text>"#,
            at(summary.median) - LEFT,
            at(summary.min),
            at(summary.max),
            at(summary.max) + 6.0,
            y + BAR - 2.0,
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let svg = draw(&super::super::example());
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.contains("spread") && line.starts_with("<rect"))
            .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        // 100 and 40 ns, 800 and 200 ns; the longest line is of 1000 ns.
        let full = WIDTH - LEFT - RIGHT;
        let expected = [0.1, 0.04, 0.8, 0.2].map(|part| part * full);
        assert_eq!(widths.len(), expected.len());
        for (width, expected) in widths.iter().zip(expected) {
            assert!((width - expected).abs() < 0.1, "{width} and not {expected}");
        }
    }

    #[test]
    fn what_a_machine_is_called_cannot_break_the_drawing() {
        let svg = draw(&super::super::example());
        assert!(svg.contains("A &lt;fast&gt; &amp; wide one"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert!(svg.ends_with("</svg>\n"));
    }
}
