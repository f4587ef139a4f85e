//! The table as a picture: one group of bars a load.

use std::fmt::Write;

use crate::report::{CONTESTANTS, Report};

const COLOURS: [&str; 4] = ["#1b6ca8", "#c9a227", "#8a8a8a", "#4d4d4d"];
const BAR: usize = 11;
const LEFT: usize = 290;
const WIDTH: usize = 640;

/// An SVG of all loads: each bar is a rate, to the fastest of its load.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 40;
    for (n, name) in CONTESTANTS.iter().enumerate() {
        let x = LEFT + 160 * n;
        let colour = COLOURS[n];
        let _ = write!(body, r#"<rect x="{x}" y="12" width="11" height="11" fill="{colour}"/>"#);
        let _ = writeln!(body, r#"<text x="{}" y="22">{name}</text>"#, x + 16);
    }
    for row in &report.rows {
        let medians: [_; 4] = std::array::from_fn(|n| row.median(n));
        let rates = medians.iter().flatten().map(|sample| sample.rate);
        let best = rates.fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(body, r#"<text x="8" y="{}">{}</text>"#, y + 10, row.title);
        for (n, sample) in medians.iter().enumerate() {
            let Some(sample) = sample else { continue };
            let width = sample.rate / best * WIDTH as f64;
            let _ = write!(
                body,
                r#"<rect x="{LEFT}" y="{y}" width="{width:.0}" height="{}" fill="{}"/>"#,
                BAR - 1,
                COLOURS[n]
            );
            let at = LEFT as f64 + width + 6.0;
            let rate = sample.rate / 1e3;
            let _ = writeln!(body, r#"<text x="{at:.0}" y="{}">{rate:.1}</text>"#, y + 9);
            y += BAR;
        }
        y += 9;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1000\" height=\"{}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"22\">thousands of transfers a second</text>\n{body}</svg>\n",
        y + 10
    )
}
