//! From descriptor chains to [`Buffers`]: guest memory in place, without copies.
#![allow(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::memory::GuestMemory;
use crate::store::Buffers;

/// Most descriptors of a chain that we follow. The standard's bound is the queue size; QEMU's own
/// devices allow this many.
const MAX_DESCRIPTORS: usize = 1024;

/// A request as the driver laid it out: what the device reads, and what it writes.
#[derive(Debug)]
pub(super) struct Chain {
    /// Names the chain in the used ring.
    pub head: u16,
    /// Driver's part.
    pub readable: Buffers,
    /// Device's part.
    pub writable: Buffers,
}

/// A chain that breaks the rules: it cannot be answered, only given back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadChain {
    /// Names the chain in the used ring.
    pub head: u16,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Resolves a chain against guest memory. The buffers keep `memory` mapped.
pub(super) fn resolve(
    memory: &Arc<Guard>,
    mut chain: DescriptorChain<&GuestMemory>,
) -> Result<Chain, BadChain> {
    let head = chain.head_index();
    let bad = |why| BadChain { head, why };
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    let mut complete = false;
    for (count, descriptor) in chain.by_ref().enumerate() {
        if count >= MAX_DESCRIPTORS {
            return Err(bad("too many descriptors"));
        }
        let list = match descriptor.is_write_only() {
            true => &mut writable,
            // VIRTIO 1.3 2.7.4.2: all device-readable descriptors come first.
            false if !writable.is_empty() => return Err(bad("readable after writable descriptor")),
            false => &mut readable,
        };
        append(&memory.0, descriptor.addr(), descriptor.len(), list)
            .ok_or(bad("descriptor outside guest memory"))?;
        complete = !descriptor.has_next();
    }
    if !complete {
        // The iterator stops without a word at loops, bad indices and bad indirect tables.
        return Err(bad("chain without an end"));
    }
    let owner = || Arc::clone(memory) as Arc<dyn Any + Send + Sync>;
    // SAFETY: every segment was found inside a mapped region of `memory`, which the owner keeps
    // mapped; Rust references to guest memory do not exist.
    let list = |segments: Vec<_>| unsafe { Buffers::from_raw(segments.into_iter(), owner()) };
    Ok(Chain { head, readable: list(readable), writable: list(writable) })
}

/// Adds the pieces of a guest-physical range; `None` if part of it is not memory.
fn append(
    memory: &GuestMemory,
    address: GuestAddress,
    len: u32,
    list: &mut Vec<(*mut u8, usize)>,
) -> Option<()> {
    for slice in memory.get_slices(address, len as usize) {
        let slice = slice.ok()?;
        list.push((slice.ptr_guard_mut().as_ptr(), slice.len()));
    }
    Some(())
}

/// What in-flight buffers hold to keep guest memory mapped. Each queue has one of its own, so that
/// counting references touches no memory that queues share.
#[derive(Debug)]
pub(super) struct Guard(pub Arc<GuestMemory>);
