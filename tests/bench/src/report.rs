//! Results as Markdown tables and SVG charts.

use std::fmt;
use std::fs;
use std::path::Path;

use plotters::prelude::*;

/// The results of one suite.
pub(crate) struct Section {
    pub(crate) title: &'static str,
    /// The method, and the servers that were left out.
    pub(crate) notes: Vec<String>,
    pub(crate) tables: Vec<Table>,
    pub(crate) charts: Vec<Chart>,
}

/// A table of results.
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) columns: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

/// A line chart with logarithmic axes.
pub(crate) struct Chart {
    /// The file name without extension.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) x: &'static str,
    pub(crate) y: &'static str,
    pub(crate) lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "## {}\n", self.title)?;
        for note in &self.notes {
            writeln!(f, "{note}\n")?;
        }
        for Table {
            title,
            columns,
            rows,
        } in &self.tables
        {
            writeln!(f, "**{title}**\n")?;
            writeln!(f, "| {} |", columns.join(" | "))?;
            writeln!(f, "| ---{} |", " | ---:".repeat(columns.len() - 1))?;
            for row in rows {
                writeln!(f, "| {} |", row.join(" | "))?;
            }
            writeln!(f)?;
        }
        for Chart { name, title, .. } in &self.charts {
            writeln!(f, "![{title}]({name}.svg)\n")?;
        }
        Ok(())
    }
}

/// Writes `report.md` and the charts to `directory`.
///
/// # Errors
///
/// Fails if a file cannot be written.
pub(crate) fn write(directory: &Path, header: &str, sections: &[Section]) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot write {}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(failed)?;
    let mut text = format!("# Benchmark\n\n{header}\n\n");
    for section in sections {
        text.push_str(&section.to_string());
        for chart in &section.charts {
            let path = directory.join(chart.name).with_extension("svg");
            draw(chart, &path)
                .map_err(|error| format!("cannot draw {}: {error}", path.display()))?;
        }
    }
    fs::write(directory.join("report.md"), text).map_err(failed)
}

fn draw(chart: &Chart, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let points = || chart.lines.iter().flat_map(|(_, points)| points);
    let range = |coordinate: fn(&(f64, f64)) -> f64| {
        let min = points().map(coordinate).fold(f64::INFINITY, f64::min);
        let max = points().map(coordinate).fold(0.0, f64::max);
        (min / 1.5..max * 1.5).log_scale()
    };
    let area = SVGBackend::new(path, (760, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut drawing = ChartBuilder::on(&area)
        .caption(chart.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(range(|point| point.0), range(|point| point.1))?;
    drawing
        .configure_mesh()
        .x_desc(chart.x)
        .y_desc(chart.y)
        .x_label_formatter(&axis_label)
        .y_label_formatter(&axis_label)
        .draw()?;
    for (index, (name, points)) in chart.lines.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        drawing
            .draw_series(
                LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3),
            )?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    drawing
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

/// Formats a number without needless decimals.
fn axis_label(value: &f64) -> String {
    if *value >= 10.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}
