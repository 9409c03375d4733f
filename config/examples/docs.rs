//! Prints `docs/configuration.md`.

fn main() {
    print!("{}", understudy_config::page());
}
