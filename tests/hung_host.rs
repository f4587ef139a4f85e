//! A host that hangs at one disk must not hang the others. With LUN 0 on a file system that is frozen, as every
//! snapshot of a host freezes it, or on FUSE with a server that is stopped, whatever is in flight to it: other units,
//! queues, functions, messages and guests go on, and after the thaw everything is as it should be.
//!
//! A file system hangs here until the others have answered: a daemon that waits for it fails by
//! [`frontend::PATIENCE`].

mod frontend;
mod mounts;

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use frontend::cdb::{FUA, write_same};
use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE};
use frontend::control::{event, tmf_response};
use frontend::daemon::host_read;
use frontend::pattern::{assert_same, blocks};
use frontend::protocol::request;
use frontend::scsi::response;
use frontend::*;
use mounts::{Hang, Hanging, Hung, Kind, Mount};

/// Queues on which commands to the hung unit are in flight; one more stays idle.
const QUEUES: usize = 4;
const IDLE: usize = FIRST_REQUEST_QUEUE + QUEUES;
const DISK: usize = 16 << 20;
const BLOCK: usize = 512;
/// Memory that only some commands use, to see whether somebody writes to it.
const WATCHED: RegionSpec = RegionSpec::new(4 * GIB, 8 * MIB).reserved();

/// Units on healthy storage, and more of them on the file system that hangs.
const HEALTHY: [u16; 3] = [1, 2, 3];
const ON_THE_SAME: [u16; 2] = [4, 5];
/// A sparse file in which every direct write has to take space.
const SPARSE: u16 = 6;

/// A daemon with a unit on a file system that can hang, and units on storage that does not.
struct Rig {
    daemon: Daemon,
    scratch: Scratch,
    host: Hanging,
    how: Hang,
    _tmpfs: Mount,
}

impl Rig {
    fn new(how: Hang, options: &str) -> Option<Self> {
        let host = Hanging::new(how)?;
        let tmpfs = Mount::new(Kind::Tmpfs, 64)?;
        let scratch = Scratch::new();
        let image = |directory: PathBuf, name: &str| {
            let path = directory.join(name);
            std::fs::write(&path, first_content()).unwrap();
            path
        };
        // What the kernel has of it in its cache is what the daemon has asked for.
        let behind = match &host {
            Hanging::Fuse(fuse) => fuse.behind(),
            Hanging::Frozen(mount) => mount.path(),
        };
        let healthy = |name| image(scratch.path().into(), name);
        for name in ["hangs.img", "same-1.img", "same-2.img"] {
            image(behind.clone(), name);
        }
        let hanging = |name| host.path().join(name);
        let daemon = Daemon::builder(&scratch)
            .disk(&hanging("hangs.img"), &["lun=0", options].join(","))
            .disk(&healthy("cached.img"), "lun=1")
            .disk(&healthy("direct.img"), "lun=2,cache=direct")
            .disk(&image(tmpfs.path(), "memory.img"), "lun=3")
            .disk(&hanging("same-1.img"), "lun=4")
            .disk(&hanging("same-2.img"), "lun=5,cache=direct")
            .disk(&scratch.image("sparse.img", DISK as u64), "lun=6,cache=direct")
            .ports(2)
            .spawn();
        Some(Rig { daemon, scratch, host, how, _tmpfs: tmpfs })
    }

    fn front_end(&self) -> FrontEnd {
        let mut layout = RegionSpec::single();
        layout.push(WATCHED);
        let builder = FrontEnd::builder().queues(QUEUES + 1);
        builder.memory(layout, MemoryMessage::Slots).connect(&self.daemon)
    }

    fn other_front_end(&self) -> FrontEnd {
        FrontEnd::builder().connect_to(&self.daemon, 1)
    }

    fn hang(&self) -> Hung {
        self.host.hang()
    }

    /// Whether a thread of the daemon waits for the host.
    fn has_stuck_thread(&self) -> bool {
        let places = ["percpu_rwsem_wait", "request_wait_answer", "fuse_"];
        let threads = self.daemon.diagnosis().thread_states();
        threads.iter().any(|thread| places.iter().any(|place| thread.contains(place)))
    }

    /// The image of unit 0, as the host has it.
    fn image(&self) -> PathBuf {
        self.host.path().join("hangs.img")
    }
}

/// Runs a test on every kind of host that can hang, with the unit on it served in every way.
fn on_each_host(test: impl Fn(&Rig)) {
    let hosts = [
        Hang::Frozen(Kind::Ext4),
        Hang::Frozen(Kind::Xfs),
        Hang::Frozen(Kind::Btrfs),
        Hang::Fuse { writeback: false },
        Hang::Fuse { writeback: true },
    ];
    for how in hosts {
        for options in ["cache=writeback", "cache=direct"] {
            eprintln!("--- {how:?}, {options}");
            let Some(rig) = Rig::new(how, options) else { continue };
            test(&rig);
        }
    }
}

/// What every disk holds at first.
fn first_content() -> Vec<u8> {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    CONTENT.get_or_init(|| blocks(0, DISK / BLOCK, BLOCK, 0)).clone()
}

// ----- commands of every kind -----------------------------------------------------------------

/// A disk as it should be, and what is on its way to it.
struct Model {
    content: Vec<u8>,
    rng: Rng,
    stamp: u64,
    pending: Vec<Pending>,
}

struct Pending {
    ticket: Ticket,
    what: &'static str,
    /// What a read should find.
    expected: Option<Vec<u8>>,
}

/// A part of the disk that one command of a mix has to itself.
const PLACE: usize = 128 << 10;
const PLACES: usize = 16;

impl Model {
    fn new(seed: u64) -> Self {
        Model { content: first_content(), rng: Rng::new(seed), stamp: 1, pending: Vec::new() }
    }

    fn fill(&mut self, at: usize, count: usize) -> Vec<u8> {
        self.stamp += 1;
        let data = blocks((at / BLOCK) as u64, count, BLOCK, self.stamp);
        self.content[at..at + data.len()].copy_from_slice(&data);
        data
    }

    /// Submits commands of all kinds to a unit, in any order, each to a place of its own in the `area`th part of the disk. A
    /// short write comes first: it is what a queue does itself.
    fn submit_mix(&mut self, lun: &Lun<'_>, area: usize) {
        const KINDS: usize = 12;
        let mut places: Vec<usize> = (0..PLACES).collect();
        let mut kinds: Vec<usize> = (1..KINDS).collect();
        for list in [&mut places, &mut kinds] {
            (1..list.len()).for_each(|i| list.swap(i, self.rng.below(i as u64 + 1) as usize));
        }
        let at = |place: usize| (area * PLACES + place) * PLACE;
        for (kind, place) in [0].into_iter().chain(kinds).zip(places) {
            self.submit(lun, kind, at(place));
        }
    }

    fn submit(&mut self, lun: &Lun<'_>, kind: usize, at: usize) {
        let lba = (at / BLOCK) as u64;
        let short = lba as u32;
        let shape = self.shape();
        let request = |cdb| lun.request(cdb).shape(shape);
        let mut expected = None;
        let (what, request) = match kind {
            0 | 1 => ("short write", request(cdb::write10(short, 8)).data_out(self.fill(at, 8))),
            2 => ("write", request(cdb::write16(lba, 128)).data_out(self.fill(at, 128))),
            3 => (
                "odd write",
                request(cdb::write10(short + 1, 3)).data_out(self.fill(at + BLOCK, 3)),
            ),
            4 => ("FUA write", {
                let cdb = cdb::write10(short, 8).or(1, FUA);
                request(cdb).data_out(self.fill(at, 8))
            }),
            5 => ("UNMAP", {
                self.content[at..at + 128 * BLOCK].fill(0);
                let list = cdb::unmap_list(&[(lba, 128)]);
                request(cdb::unmap(false, list.len() as u16)).data_out(list)
            }),
            6 => ("WRITE SAME", {
                self.stamp += 1;
                let block = blocks(lba, 1, BLOCK, self.stamp);
                let all = block.repeat(128);
                self.content[at..at + all.len()].copy_from_slice(&all);
                request(cdb::write_same16(0, lba, 128)).data_out(block)
            }),
            7 => ("WRITE SAME with UNMAP", {
                self.content[at..at + 128 * BLOCK].fill(0);
                let cdb = cdb::write_same16(write_same::UNMAP, lba, 128);
                request(cdb).data_out(vec![0; BLOCK])
            }),
            8 => ("COMPARE AND WRITE", {
                let old = self.content[at..at + BLOCK].to_vec();
                let new = self.fill(at, 1);
                request(cdb::compare_and_write(lba, 1)).data_out([old, new].concat())
            }),
            9 => ("read", {
                expected = Some(self.content[at..at + PLACE].to_vec());
                request(cdb::read16(lba, (PLACE / BLOCK) as u32)).data_in(PLACE)
            }),
            10 => ("GET LBA STATUS", request(cdb::get_lba_status16(lba, 64, 0)).data_in(64)),
            _ => ("flush", request(cdb::synchronize_cache10(0, 0))),
        };
        self.pending.push(Pending { ticket: lun.submit(&request), what, expected });
    }

    /// Buffers that the host can use in place, and others.
    fn shape(&mut self) -> Shape {
        match self.rng.below(4) {
            0 => Shape::default().aligned(4096),
            1 => Shape::default().aligned(4096).skewed(1).indirect(),
            2 => Shape { writable: Cuts::DataEvery(8192), ..Shape::default() }
                .aligned(4096)
                .indirect(),
            _ => Shape::default().indirect(),
        }
    }

    /// Demands that everything submitted ends well, and that the disk is as it should be.
    #[track_caller]
    fn settle(&mut self, lun: &Lun<'_>) {
        for Pending { ticket, what, expected } in std::mem::take(&mut self.pending) {
            let response = lun.front_end().wait(ticket);
            assert!(response.is_good(), "{what}: {response:?}");
            if let Some(expected) = expected {
                assert_same(response.data(), &expected, what);
            }
        }
        self.check(lun);
    }

    #[track_caller]
    fn check(&self, lun: &Lun<'_>) {
        const STEP: usize = 8 << 20;
        for at in (0..DISK).step_by(STEP) {
            let found = lun.read16((at / BLOCK) as u64, (STEP / BLOCK) as u32);
            assert_same(&found, &self.content[at..at + STEP], "the disk");
        }
    }
}

/// Uses the healthy units, and waits for each answer.
#[track_caller]
fn healthy_units_answer(luns: &[Lun<'_>], queue: usize, stamp: u64) {
    for lun in luns {
        let lun = lun.on_queue(queue);
        let lba = (queue * 2048) as u32;
        for (count, shape) in
            [(8, Shape::default().aligned(4096)), (128, Shape::default().skewed(1))]
        {
            let lun = lun.with_shape(shape);
            let data = blocks(lba.into(), count, BLOCK, stamp);
            lun.write10(lba, &data);
            assert_same(&lun.read10(lba, count as u16), &data, "what was written");
        }
        let data = blocks(lba.into(), 8, BLOCK, stamp + 1);
        lun.run_out(cdb::write10(lba, 8).or(1, FUA), &data).expect_good();
        lun.synchronize_cache();
        let list = cdb::unmap_list(&[((lba + 8).into(), 8)]);
        lun.run_out(cdb::unmap(false, list.len() as u16), &list).expect_good();
        let pattern = blocks(7, 1, BLOCK, stamp);
        lun.run_out(cdb::write_same16(0, (lba + 16).into(), 8), &pattern).expect_good();
        lun.run_in(cdb::get_lba_status16(lba.into(), 64, 0), 64).expect_good();
        let both = [&data[..BLOCK], &pattern].concat();
        lun.run_out(cdb::compare_and_write(lba.into(), 1), &both).expect_good();
        let expected = [&pattern, &data[BLOCK..], &[0; 8 * BLOCK], &pattern.repeat(8)].concat();
        assert_same(&lun.read10(lba, 24), &expected, "what was written");
    }
}

fn ready<'a>(fe: &'a FrontEnd, units: &[u16]) -> Vec<Lun<'a>> {
    units.iter().map(|&unit| fe.ready_lun(0, unit)).collect()
}

/// Messages that need an answer, about queues that have something in flight and one that has not.
#[track_caller]
fn messages_are_answered(fe: &FrontEnd, lun: &Lun<'_>) {
    for index in 0..=IDLE {
        let call = fe.queue(index).call_fd().as_raw_fd();
        fe.set(request::SET_VRING_CALL, &(index as u64).to_ne_bytes(), &[call], true);
    }
    let base = fe.stop_queue(IDLE);
    fe.start_queue(IDLE, base);
    lun.on_queue(IDLE).test_unit_ready();
    let more = RegionSpec::new(1 << 40, MIB).reserved();
    fe.add_region(&more);
    let shape = Shape::default().in_region(more.base);
    lun.on_queue(IDLE).with_shape(shape).read10(0, 8);
    fe.remove_region(more.base);
}

// ----- tests ----------------------------------------------------------------------------------

#[test]
fn other_units_go_on_while_one_hangs() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY);
        let hanging = fe.ready_lun(0, 0);
        let mut model = Model::new(1);
        for round in 0..3 {
            let hung = rig.hang();
            for queue in 0..QUEUES {
                model.submit_mix(&hanging.on_queue(FIRST_REQUEST_QUEUE + queue), queue);
            }
            for queue in FIRST_REQUEST_QUEUE..=IDLE {
                healthy_units_answer(&healthy, queue, round);
            }
            drop(hung);
            model.settle(&hanging);
        }
    });
}

#[test]
fn functions_for_other_units_are_answered_while_one_hangs() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY);
        let hanging = fe.ready_lun(0, 0);
        let mut model = Model::new(2);
        let hung = rig.hang();
        for queue in 0..QUEUES {
            model.submit_mix(&hanging.on_queue(FIRST_REQUEST_QUEUE + queue), queue);
        }
        for lun in &healthy {
            for function in [Tmf::QueryTask, Tmf::QueryTaskSet, Tmf::AbortTask, Tmf::AbortTaskSet] {
                let code = fe.tmf(function, lun.address, 0xffff_0000);
                assert_eq!(code, response::FUNCTION_COMPLETE, "{function:?}");
            }
            let code = fe.tmf(Tmf::LogicalUnitReset, lun.address, 0);
            assert_eq!(code, response::FUNCTION_COMPLETE);
            assert_eq!(lun.clear_unit_attentions().len(), 1);
        }
        // What hangs is there, and says so.
        let at = QUEUES * PLACES * PLACE;
        let write = cdb::write10((at / BLOCK) as u32, 8).or(1, FUA);
        let write = hanging.request(write).data_out(model.fill(at, 8));
        let ticket = hanging.submit(&write);
        let code = fe.tmf(Tmf::QueryTask, hanging.address, write.tag);
        assert_eq!(code, response::FUNCTION_SUCCEEDED);
        assert_eq!(fe.tmf(Tmf::QueryTaskSet, hanging.address, 0), response::FUNCTION_SUCCEEDED);
        assert!(fe.queue(FIRST_REQUEST_QUEUE).try_take(ticket).is_none(), "it does not hang");
        drop(hung);
        fe.wait(ticket).expect_good();
        model.settle(&hanging);
    });
}

#[test]
fn messages_are_answered_while_a_unit_hangs() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY);
        let hanging = fe.ready_lun(0, 0);
        let mut model = Model::new(3);
        let hung = rig.hang();
        for queue in 0..QUEUES {
            model.submit_mix(&hanging.on_queue(FIRST_REQUEST_QUEUE + queue), queue);
        }
        messages_are_answered(&fe, &healthy[0]);
        drop(hung);
        model.settle(&hanging);
    });
}

#[test]
fn another_guest_connects_while_a_unit_hangs() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let hanging = fe.ready_lun(0, 0);
        let mut model = Model::new(4);
        let hung = rig.hang();
        for queue in 0..QUEUES {
            model.submit_mix(&hanging.on_queue(FIRST_REQUEST_QUEUE + queue), queue);
        }
        let other = rig.other_front_end();
        let units = ready(&other, &HEALTHY);
        // It gets stuck at the same disk, and goes on with the others.
        let stuck = other.lun(0, 0);
        stuck.clear_unit_attentions();
        let data = model.fill(DISK - 4096, 8);
        let at = ((DISK - 4096) / BLOCK) as u32;
        let ticket = stuck.submit(&stuck.request(cdb::write10(at, 8)).data_out(data));
        healthy_units_answer(&units, FIRST_REQUEST_QUEUE, 1);
        drop(hung);
        other.wait(ticket).expect_good();
        model.settle(&hanging);
    });
}

#[test]
fn sighup_asks_the_other_hosts_while_one_hangs() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let hanging = fe.ready_lun(0, 0);
        let grows = fe.ready_lun(0, 1);
        let mut model = Model::new(5);
        let hung = rig.hang();
        model.submit_mix(&hanging, 0);
        let image = rig.scratch.join("cached.img");
        let larger = DISK as u64 + MIB;
        std::fs::OpenOptions::new().write(true).open(image).unwrap().set_len(larger).unwrap();
        rig.daemon.sighup();
        let told = fe.next_event(PATIENCE).unwrap_or_else(|| fe.diagnosis().fail("no event"));
        assert_eq!((told.event, told.address), (event::PARAM_CHANGE, Address::peripheral(0, 1)));
        grows.clear_unit_attentions();
        assert_eq!(grows.capacity().0, larger / BLOCK as u64);
        // And again: what hangs from the first time is in nobody's way.
        rig.daemon.sighup();
        let other = rig.other_front_end();
        ready(&other, &HEALTHY);
        drop(hung);
        model.settle(&hanging);
    });
}

#[test]
fn functions_for_a_hung_unit_wait_for_its_commands() {
    const COUNT: usize = 128;
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY[..1]);
        let hanging = fe.ready_lun(0, 0);
        let mut stamp = 1;
        let functions =
            [Tmf::AbortTask, Tmf::AbortTaskSet, Tmf::LogicalUnitReset, Tmf::ItNexusReset];
        for (turn, function) in functions.into_iter().enumerate() {
            stamp += 2;
            let places = (0..QUEUES).map(|queue| (queue * 2048) as u64);
            let old: Vec<_> = places.map(|lba| hanging.read16(lba, COUNT as u32)).collect();
            let hung = rig.hang();
            let mut writes = Vec::new();
            let mut reads = Vec::new();
            for (queue, old) in old.into_iter().enumerate() {
                let lun = hanging.on_queue(FIRST_REQUEST_QUEUE + queue);
                let lba = (queue * 2048) as u64;
                let new = blocks(lba, COUNT, BLOCK, stamp);
                let cdb = cdb::write16(lba, COUNT as u32).or(1, FUA);
                let request = lun.request(cdb).data_out(new.clone());
                writes.push((lun.submit(&request), request.tag, lba, old, new));
                // Each from a part of the disk that nobody has read yet.
                let cold = (DISK / BLOCK / 2 + queue * 2048 + turn * 512) as u64;
                let shape = Shape::default().aligned(4096).in_region(WATCHED.base);
                let request = lun.request(cdb::read16(cold, COUNT as u32)).shape(shape);
                let request = request.data_in(COUNT * BLOCK);
                reads.push((lun.submit(&request), request.tag));
            }
            // Each of the writes hangs, or waits for one that does.
            eventually("a write gets stuck", || rig.has_stuck_thread());
            let tags = match function {
                Tmf::AbortTask => {
                    let tags = writes.iter().map(|write| write.1);
                    tags.chain(reads.iter().map(|read| read.1)).collect()
                }
                _ => vec![0],
            };
            let functions: Vec<Ticket> = {
                let mut control = fe.queue(CONTROL_QUEUE);
                tags.iter()
                    .map(|&tag| control.submit(&function.exchange(hanging.address, tag)))
                    .collect()
            };
            // When this is answered, they have been looked at.
            assert_eq!(
                fe.tmf(Tmf::QueryTaskSet, healthy[0].address, 0),
                response::FUNCTION_COMPLETE
            );
            std::thread::sleep(A_MOMENT);
            // What has not begun may be ended at once, what hangs may not.
            let answered = {
                let mut control = fe.queue(CONTROL_QUEUE);
                functions.iter().map(|&ticket| control.peek(ticket)).filter(|&there| there).count()
            };
            assert!(answered < functions.len(), "{function:?} is answered while its command hangs");
            drop(hung);
            for ticket in functions {
                let code = tmf_response(&fe.queue(CONTROL_QUEUE).wait(ticket));
                assert_eq!(code, response::FUNCTION_COMPLETE, "{function:?}");
            }
            // Everything it was about has been answered before, and nothing happens afterwards.
            for ticket in writes.iter().map(|write| write.0).chain(reads.iter().map(|read| read.0))
            {
                let ended = fe.queue(ticket.queue).try_take(ticket);
                let ended =
                    ended.unwrap_or_else(|| fe.diagnosis().fail("a command is not answered"));
                let code = ScsiResponse::parse(&ended).response;
                let allowed = [response::OK, response::ABORTED, response::RESET];
                assert!(allowed.contains(&code), "{function:?}: {code}");
            }
            let poison = vec![0x3c; WATCHED.size as usize];
            fe.memory().write(WATCHED.base, &poison);
            hanging.clear_unit_attentions();
            healthy[0].clear_unit_attentions();
            for (.., lba, old, new) in &writes {
                let found = hanging.read16(*lba, COUNT as u32);
                assert!(found == *old || found == *new, "{function:?}: half a write at {lba}");
                hanging.write16(*lba, &blocks(*lba, COUNT, BLOCK, stamp + 1));
            }
            std::thread::sleep(A_MOMENT);
            hanging.synchronize_cache();
            for (.., lba, _, _) in &writes {
                let expected = blocks(*lba, COUNT, BLOCK, stamp + 1);
                let what = "what was written after the function";
                assert_same(&hanging.read16(*lba, COUNT as u32), &expected, what);
                assert_same(&host_content(rig, *lba, COUNT), &expected, what);
            }
            let found = fe.memory().read(WATCHED.base, poison.len());
            assert_same(&found, &poison, "memory of commands that are over");
        }
    });
}

/// What the host has in the image, looked at where it does not hang.
fn host_content(rig: &Rig, lba: u64, count: usize) -> Vec<u8> {
    let path = match &rig.host {
        Hanging::Fuse(fuse) => fuse.behind().join("hangs.img"),
        Hanging::Frozen(_) => rig.image(),
    };
    host_read(&path, lba * BLOCK as u64, count * BLOCK)
}

#[test]
fn several_hung_units_and_full_queues_are_in_nobodys_way() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY);
        let mut units = ready(&fe, &ON_THE_SAME);
        units.push(fe.ready_lun(0, 0));
        let mut models: Vec<Model> = units.iter().map(|_| Model::new(6)).collect();
        let hung = rig.hang();
        for (lun, model) in units.iter().zip(&mut models) {
            model.submit_mix(&lun.on_queue(FIRST_REQUEST_QUEUE), 0);
        }
        // One queue is given as many writes as it has room for.
        let lun = units[2].on_queue(FIRST_REQUEST_QUEUE + 1);
        let mut stuck = Vec::new();
        for at in (DISK / 2..).step_by(4096) {
            let data = blocks((at / BLOCK) as u64, 8, BLOCK, 9);
            let request = lun.request(cdb::write10((at / BLOCK) as u32, 8)).data_out(data.clone());
            let exchange = request.shape(Shape::default().indirect()).exchange();
            let ticket = fe.queue(lun.queue).try_enqueue(&exchange);
            let Some(ticket) = ticket else { break };
            models[2].content[at..at + 4096].copy_from_slice(&data);
            stuck.push(ticket);
            if stuck.len() % 16 == 0 {
                fe.queue(lun.queue).publish();
            }
            // With the cache of the host in between, they may not hang at all.
            if stuck.len() == 1000 {
                break;
            }
        }
        fe.queue(lun.queue).publish();
        for queue in (FIRST_REQUEST_QUEUE..=IDLE).filter(|&queue| queue != lun.queue) {
            healthy_units_answer(&healthy, queue, 1);
        }
        assert_eq!(
            fe.tmf(Tmf::LogicalUnitReset, healthy[0].address, 0),
            response::FUNCTION_COMPLETE
        );
        healthy[0].clear_unit_attentions();
        messages_are_answered(&fe, &healthy[0]);
        drop(hung);
        stuck.into_iter().for_each(|ticket| drop(fe.wait(ticket).expect_good()));
        for (lun, model) in units.iter().zip(&mut models) {
            model.settle(lun);
        }
    });
}

/// The kernel has few threads for the transfers of a ring that it cannot make without waiting, and they are there for
/// all files of the ring.
#[test]
fn reads_that_hang_take_no_thread_from_others() {
    const READS: usize = 20;
    const LEN: usize = 64 << 10;
    on_each_host(|rig| {
        let fe = rig.front_end();
        let hanging = fe.ready_lun(0, 0).with_shape(Shape::default().aligned(4096));
        let sparse = fe.ready_lun(0, SPARSE).with_shape(Shape::default().aligned(4096));
        let hung = rig.hang();
        let at = |n: usize| (n * DISK / BLOCK / READS) as u64;
        let cdb = |n| cdb::read16(at(n), (LEN / BLOCK) as u32);
        let reads: Vec<Ticket> =
            (0..READS).map(|n| hanging.submit(&hanging.request(cdb(n)).data_in(LEN))).collect();
        for n in 0..DISK / LEN / 4 {
            let lba = (n * 4 * LEN / BLOCK) as u64;
            sparse.write16(lba, &blocks(lba, LEN / BLOCK, BLOCK, 1));
        }
        let threads = rig.daemon.diagnosis().thread_states();
        assert!(!threads.iter().any(|thread| thread.starts_with("iou-")), "{threads:?}");
        drop(hung);
        for (n, ticket) in reads.into_iter().enumerate() {
            let expected = blocks(at(n), LEN / BLOCK, BLOCK, 0);
            assert_same(fe.wait(ticket).expect_good().data(), &expected, "what hung");
        }
    });
}

#[test]
fn hosts_that_hang_again_and_again_lose_nothing() {
    on_each_host(|rig| {
        let fe = rig.front_end();
        let healthy = ready(&fe, &HEALTHY);
        let hanging = fe.ready_lun(0, 0);
        let load = Load {
            pattern: Pattern::Mixed,
            block: 4096,
            depth: 16,
            start: DISK as u64 / 2,
            span: MIB,
            driver: Driver::Sleeps,
            verify: true,
            fua: rig.how == Hang::Fuse { writeback: true },
            seed: 1,
        };
        let over = AtomicBool::new(false);
        let loaded = hanging.on_queue(FIRST_REQUEST_QUEUE);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _over = SetAtTheEnd(&over);
                let figures = load::run(&loaded, &load, Duration::from_secs(3));
                assert!(figures.verified > 0);
            });
            let mut model = Model::new(7);
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                let hung = rig.hang();
                model.submit_mix(&hanging.on_queue(FIRST_REQUEST_QUEUE + 1), rounds % 4);
                healthy_units_answer(&healthy, FIRST_REQUEST_QUEUE + 1, 1);
                drop(hung);
                for Pending { ticket, what, expected } in std::mem::take(&mut model.pending) {
                    let response = fe.wait(ticket);
                    assert!(response.is_good(), "{what}: {response:?}");
                    expected.iter().for_each(|e| assert_same(response.data(), e, what));
                }
                rounds += 1;
            }
            eprintln!("{rounds} rounds");
        });
    });
}

/// Whether the thread that has this has ended, be it by a panic.
struct SetAtTheEnd<'a>(&'a AtomicBool);

impl Drop for SetAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
