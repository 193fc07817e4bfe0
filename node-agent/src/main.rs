//! The `tierkeep` command.

fn main() {
    std::process::exit(tierkeep_agent::run(std::env::args_os().collect()));
}
