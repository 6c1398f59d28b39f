//! `gptq report`.

use anyhow::Result;
use gptq_format::write_file;
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
        write_file(&path, text.as_bytes())?;
        eprintln!("written to {}", path.display());
    }
    if args.json {
        println!("{json}");
    }
    Ok(())
}
