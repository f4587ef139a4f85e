//! The program: parse, validate, serve. See the library's documentation for what happens inside.

use std::process::ExitCode;

use clap::Parser;
use thinlun::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    thinlun::logger::begin();
    let result = match &cli.command {
        Some(Command::Map(args)) => thinlun::map::run(args).map(|()| ExitCode::SUCCESS),
        None => thinlun::daemon::run(&cli),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            thinlun::logger::finish_with(&format!("thinlun: {error}"));
            ExitCode::from(error.status)
        }
    }
}
