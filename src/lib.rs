//! thinlun: SCSI disks for QEMU guests, served from host files over a vhost-user socket.
//!
//! The way of a request: the driver kicks a queue → [`vhost`]'s worker for that queue pops a chain,
//! reads the virtio-scsi header and splits the guest's buffers → [`scsi`] finds the command in its
//! table, checks it and plans what has to happen → an engine of [`store`] does it beside the queue
//! thread → the same worker writes the response and publishes the used buffer.
//!
//! Imports run one way: `map` uses `store` alone, `vhost` and `daemon` use `scsi` and `store`, `scsi` uses `store`, `store`
//! uses nothing of ours but [`sandbox`], which all make their threads with, and [`limits`].
#![deny(unsafe_code, missing_docs, rust_2018_idioms, unreachable_pub)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::todo,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::undocumented_unsafe_blocks
)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod limits;
pub mod logger;
pub mod map;
pub mod sandbox;
pub mod scsi;
pub mod store;
pub mod vhost;
