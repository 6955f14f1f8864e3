//! Process start and end: runs the command, prints an error with its hint, sets the exit code.

use std::process::ExitCode;

use clap::Parser;
use podium::cli::Cli;

fn main() -> ExitCode {
    podium::telemetry::process_start();
    let cli = Cli::parse();
    match podium::run(cli) {
        Ok(code) => code.into(),
        Err(error) => {
            podium::error::print(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
