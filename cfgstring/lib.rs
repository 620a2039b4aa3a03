//! The configuration string of a `user:img` backstore.
