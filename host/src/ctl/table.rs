//! Tables for terminals.

use std::fmt;

/// A table with a head line. `>` before a column's name aligns the column to the right.
pub(super) struct Table<const N: usize> {
    names: [&'static str; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(names: [&'static str; N]) -> Self {
        Self {
            names,
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, row: [String; N]) {
        self.rows.push(row);
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self
            .names
            .map(|name| name.trim_start_matches('>').to_string());
        let rows = || std::iter::once(&names).chain(&self.rows);
        let widths: [usize; N] = std::array::from_fn(|column| {
            let widths = rows().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0)
        });
        for row in rows() {
            let mut line = String::new();
            for ((cell, width), name) in row.iter().zip(widths).zip(self.names) {
                line += &if name.starts_with('>') {
                    format!("{cell:>width$}  ")
                } else {
                    format!("{cell:<width$}  ")
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
