//! The NBD export: by the clients of others, over TLS, over passed sockets, with every format, and under clients that mean harm.

mod activation;
mod commands;
mod formats;
mod harness;
mod hostile;
mod tls;
