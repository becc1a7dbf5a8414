//! Rows with their goals: printed, and written as JSON, as a Markdown table and as a chart.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Serialize;

/// What a row wants.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    Reported,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) id: &'static str,
    pub(crate) work: String,
    pub(crate) goal: Goal,
    pub(crate) measured: f64,
    /// Of goal and measurement; "×" is host against native.
    pub(crate) unit: &'static str,
    /// What stands behind the measurement, as words: absolute figures of this run on this machine.
    pub(crate) figures: String,
}

impl Row {
    fn is_met(&self) -> Option<bool> {
        match self.goal {
            Goal::AtLeast(goal) => Some(self.measured >= goal),
            Goal::AtMost(goal) => Some(self.measured <= goal),
            Goal::Reported => None,
        }
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::AtLeast(goal) => format!("≥ {}", self.with_unit(goal)),
            Goal::AtMost(goal) => format!("≤ {}", self.with_unit(goal)),
            Goal::Reported => "reported".into(),
        }
    }

    fn with_unit(&self, value: f64) -> String {
        let value = match value {
            v if v >= 100.0 => format!("{v:.0}"),
            v if v >= 10.0 => format!("{v:.1}"),
            v if v >= 1.0 => format!("{v:.2}"),
            v => format!("{v:.3}"),
        };
        let value = match value.contains('.') {
            true => value.trim_end_matches('0').trim_end_matches('.'),
            false => &value,
        };
        match self.unit {
            "×" => format!("{value} ×"),
            unit => format!("{value} {unit}"),
        }
    }

    fn verdict(&self) -> &'static str {
        match self.is_met() {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        }
    }

    /// One line of the table.
    pub(crate) fn line(&self) -> String {
        format!(
            "| {} | {} | {} | {} | {} | {} |",
            self.id,
            self.work,
            self.goal(),
            self.with_unit(self.measured),
            self.verdict(),
            self.figures
        )
    }
}

pub(crate) const HEAD: &str =
    "| id | work | goal | measured | met | behind it |\n|---|---|---|---|---|---|";

/// Writes `results.json`, `table.md` and `chart.svg`.
pub(crate) fn write(folder: &Path, rows: &[Row]) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let all = serde_json::json!({ "cores": cores, "rows": rows });
    fs::write(
        folder.join("results.json"),
        serde_json::to_string_pretty(&all)? + "\n",
    )?;
    let lines: Vec<_> = rows.iter().map(Row::line).collect();
    fs::write(
        folder.join("table.md"),
        format!("{HEAD}\n{}\n", lines.join("\n")),
    )?;
    fs::write(folder.join("chart.svg"), chart(rows)?)?;
    Ok(())
}

/// Sizes of the chart, in its own units.
const LINE: usize = 26;
const LABEL: f64 = 900.0;
const BAR: f64 = 360.0;
/// Where the goals stand, as a part of the bars' length.
const GOAL_AT: f64 = 0.5;

/// A bar for each row with a goal, as long as it is better than its goal.
fn chart(rows: &[Row]) -> Result<String, std::fmt::Error> {
    let rows: Vec<_> = rows.iter().filter(|row| row.is_met().is_some()).collect();
    let (width, height) = (LABEL + BAR + 110.0, (rows.len() + 2) * LINE);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let goal = LABEL + BAR * GOAL_AT;
    writeln!(
        svg,
        "<text x=\"{goal}\" y=\"17\" text-anchor=\"middle\" fill=\"#555\">goal</text>"
    )?;
    for (n, row) in rows.iter().enumerate() {
        let y = (n + 1) * LINE;
        let better = match row.goal {
            Goal::AtLeast(goal) => row.measured / goal,
            Goal::AtMost(_) if row.measured <= 0.0 => f64::INFINITY,
            Goal::AtMost(goal) => goal / row.measured,
            Goal::Reported => 1.0,
        };
        let length = BAR * (GOAL_AT * better).min(1.0);
        let colour = if row.is_met() == Some(true) {
            "#2a7f62"
        } else {
            "#b5482a"
        };
        writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} {}</text>\n\
             <rect x=\"{LABEL}\" y=\"{y}\" width=\"{length:.0}\" height=\"{}\" fill=\"{colour}\"/>\n\
             <text x=\"{:.0}\" y=\"{}\">{}</text>",
            LABEL - 8.0,
            y + 14,
            row.id,
            escaped(&row.work),
            LINE - 8,
            LABEL + length + 6.0,
            y + 14,
            escaped(&row.with_unit(row.measured)),
        )?;
    }
    let bottom = (rows.len() + 1) * LINE;
    writeln!(
        svg,
        "<line x1=\"{goal}\" x2=\"{goal}\" y1=\"22\" y2=\"{bottom}\" stroke=\"#555\" stroke-dasharray=\"4 3\"/>\n</svg>"
    )?;
    Ok(svg)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
