//! Any descriptor chains, indirect tables and requests, through the real queue threads.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread_local;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Input;
use super::session::Session;

const SIZE: u16 = 16;
const MEMORY: u64 = 64 << 10;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Where the input's own bytes are put.
const DATA: u64 = 0x1000;
/// Of the used ring: flags, index, entries, and the index at which a kick is wanted.
const KICK_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

thread_local! {
    static SESSION: Session = Session::new(MEMORY);
    static LEGACY: Session = Session::legacy(MEMORY);
}

/// In the first byte: by a legacy driver.
const OF_LEGACY: u8 = 0x80;

pub fn run(bytes: &[u8]) {
    let legacy = bytes.first().is_some_and(|byte| byte & OF_LEGACY != 0);
    let session = if legacy { &LEGACY } else { &SESSION };
    session.with(|session| one(session, &mut Input::new(bytes)));
}

fn one(session: &Session, input: &mut Input<'_>) {
    let queue = match input.byte() % 8 {
        0 => 0,
        1 => 1,
        _ => 2,
    };
    let entries = input.byte();
    let jump =
        if entries >= 0xf0 { u16::from(entries) << 4 } else { u16::from(entries) % (SIZE + 1) };
    let mut image = vec![0; MEMORY as usize];
    for index in 0..usize::from(SIZE) {
        // Addresses near the memory there is, lengths near what requests have.
        let address = u64::from(input.u16()) | u64::from(input.byte() & 1) << 16;
        let len = u32::from(input.u16());
        let flags = u16::from(input.byte());
        let next = u16::from(input.byte()) % (SIZE + 2);
        let at = DESCRIPTORS as usize + 16 * index;
        let far = if flags & 0x80 != 0 { 0xffff_ffff_ffff_0000 } else { 0 };
        image[at..at + 8].copy_from_slice(&(address | far).to_le_bytes());
        image[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
        image[at + 12..at + 14].copy_from_slice(&(flags & 7).to_le_bytes());
        image[at + 14..at + 16].copy_from_slice(&next.to_le_bytes());
    }
    let available = AVAILABLE as usize;
    image[available + 2..available + 4].copy_from_slice(&jump.to_le_bytes());
    for entry in 0..usize::from(SIZE) {
        let head = u16::from(input.byte()) % (SIZE + 1);
        image[available + 4 + 2 * entry..][..2].copy_from_slice(&head.to_le_bytes());
    }
    let rest = input.bytes(input.0.len().min((MEMORY - DATA) as usize));
    image[DATA as usize..][..rest.len()].copy_from_slice(&rest);
    session.memory.write_all_at(&image, 0).expect("memory");

    let kick = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    session.start(queue, SIZE.into(), [DESCRIPTORS, AVAILABLE, USED], kick.as_raw_fd());
    if queue != 1 && jump <= SIZE {
        wait_until_taken(session, jump);
    }
    session.stop(queue);
}

/// Until the queue has seen all it was given and asks for kicks, or has given up. The input may itself write
/// to where that is told, so that there is an end to waiting.
fn wait_until_taken(session: &Session, index: u16) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(2) {
        let mut event = [0; 2];
        session.memory.read_exact_at(&mut event, KICK_EVENT).expect("memory");
        if u16::from_le_bytes(event) == index {
            return;
        }
        std::thread::yield_now();
    }
}
