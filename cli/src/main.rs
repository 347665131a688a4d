//! The one binary of md99.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
