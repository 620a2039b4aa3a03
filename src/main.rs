//! The `img-tcmu` command.

fn main() {}
