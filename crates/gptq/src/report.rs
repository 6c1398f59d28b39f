//! `gptq report`.

use std::fs;

use anyhow::{Result, anyhow};
use gptq_report::{Matrix, csv, html, rows};

use crate::cli::ReportArgs;

pub(crate) fn run(args: ReportArgs) -> Result<()> {
    let matrix = Matrix::read(&args.dir)?;
    let rows = rows(&matrix);
    let json = serde_json::to_string_pretty(&rows)?;
    for (name, text) in [
        ("report.html", &html(&matrix)?),
        ("report-table.csv", &csv(&rows)),
        ("report-table.json", &format!("{json}\n")),
    ] {
        let path = args.dir.join(name);
        fs::write(&path, text).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        eprintln!("written to {}", path.display());
    }
    if args.json {
        println!("{json}");
    }
    Ok(())
}
