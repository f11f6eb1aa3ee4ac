//! The report as text.

use super::{Report, empty_table, lines, spread};

/// One line for each scenario, and what the figures depend on.
pub fn draw(report: &Report) -> String {
    let mut table = empty_table(
        1..,
        [
            "scenario", "xlb ns", "spread", "floor ns", "spread", "ratio", "spread", "Mpps",
        ],
    );
    for row in &report.rows {
        table.add_row([
            row.name.clone(),
            format!("{:.1}", row.xlb_ns.median),
            spread(row.xlb_ns, 1),
            format!("{:.1}", row.floor_ns.median),
            spread(row.floor_ns, 1),
            format!("{:.2}", row.ratio.median),
            spread(row.ratio, 2),
            format!("{:.2}", row.mpps()),
        ]);
    }
    let machine = &report.machine;
    format!(
        "{}\n{}, {} rounds on processor {} of {}, Linux {}, a table for {} flows.\n\
         Nanoseconds for each packet, median and outermost rounds; the harness is subtracted.\n",
        lines(&table),
        machine.processor,
        report.rounds,
        machine.cpu.unwrap_or_default(),
        machine.processors,
        machine.kernel,
        report.flow_table,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_its_figures_with_their_spread() {
        let text = draw(&super::super::example());
        let row = text
            .lines()
            .find(|line| line.contains("known nat tcp4 1k"))
            .unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(
            cells,
            [
                "known",
                "nat",
                "tcp4",
                "1k",
                "100.0",
                "90.0–125.0",
                "40.0",
                "36.0–50.0",
                "2.50",
                "2.25–3.12",
                "10.00"
            ]
        );
        assert!(text.contains("11 rounds on processor 3 of 4"), "{text}");
    }
}
