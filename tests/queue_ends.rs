//! Queues that end, in order or not, while commands and functions about them are under way: at a device reset, a message
//! that stops them, a broken connection, the end of the daemon; beside a host that hangs, and memory that goes.

mod frontend;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE as REQUESTS};
use frontend::control::tmf_response;
use frontend::daemon::Scratch;
use frontend::pattern::{assert_same, blocks};
use frontend::protocol::request;
use frontend::queue::POISON;
use frontend::scsi::response;
use frontend::*;

const SIZE: u64 = 4 * MIB;
const BLOCK: usize = 4096;

fn daemon(scratch: &Scratch, queues: usize, zero: &str) -> Daemon {
    Daemon::builder(scratch)
        .disk(&scratch.join("0.img"), zero)
        .disk(&scratch.join("1.img"), "")
        .arg(format!("--num-queues={queues}"))
        .arg(format!("--socket-path={}", scratch.join("other.sock").display()))
        .spawn()
}

fn images(scratch: &Scratch) {
    for name in ["0.img", "1.img"] {
        scratch.file(name, &blocks(0, SIZE as usize / 512, 512, 1));
    }
}

fn second(scratch: &Scratch, served: &Daemon) -> FrontEnd {
    let mut stream = None;
    eventually("the second socket", || {
        stream = UnixStream::connect(scratch.join("other.sock")).ok();
        stream.is_some()
    });
    FrontEnd::builder().queues(1).attach(stream.unwrap(), served.diagnosis())
}

/// A function that waits for a ring which has not started is answered when the daemon ends; the next daemon must not do
/// what it was about.
fn function_then_end(function: Tmf, how: &str) {
    let scratch = Scratch::new();
    images(&scratch);
    let mut served = daemon(&scratch, 2, "");
    let mut fe = FrontEnd::builder().queues(2).inflight().connect(&served);
    let lun = fe.ready_lun(0, 0);
    let read = lun.request(cdb::read16(8, 8)).data_in(BLOCK).tag(9);
    let address = lun.address;
    served.kill();
    // It takes the unit attention of the restart.
    fe.submit(REQUESTS + 1, &fe.lun(0, 0).request(cdb::test_unit_ready()).tag(8));
    let read = fe.submit(REQUESTS + 1, &read);
    let answer = fe.queue(CONTROL_QUEUE).submit(&function.exchange(address, 9));
    let mut served = daemon(&scratch, 2, "");
    fe.reconnect_without_enabling(&served);
    fe.enable_queue(CONTROL_QUEUE, true);
    eventually("the function is taken", || {
        let queue = fe.queue(CONTROL_QUEUE);
        queue.ring().avail_event() == queue.ring().published()
    });
    match how {
        "sigterm" => {
            assert!(served.terminate().success());
            served = daemon(&scratch, 2, "");
        }
        _ => {
            fe.hang_up();
            eventually("the end of the connection", || {
                served.log().contains("front end is gone")
                    || served.log().contains("connection ended")
            });
        }
    }
    let early = fe.queue(CONTROL_QUEUE).try_take(answer);
    assert!(early.is_none(), "{function:?} is answered by a daemon that has not seen its command");
    fe.reconnect(&served);
    let done = fe.queue(CONTROL_QUEUE).wait(answer);
    assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
    let read = fe.queue(REQUESTS + 1).try_take(read).expect("ended before the function");
    let read = ScsiResponse::parse(&read);
    if read.response != response::OK {
        assert_same(&read.buffer, &[POISON; BLOCK], "a buffer of a command that was ended");
    }
}

#[test]
fn a_function_that_waits_is_left_to_the_next_daemon() {
    function_then_end(Tmf::AbortTask, "sigterm");
}

#[test]
fn a_function_that_waits_is_left_to_the_next_connection() {
    function_then_end(Tmf::LogicalUnitReset, "hang up");
}

/// A write that holds its queue, taken and in flight.
fn hang(fe: &FrontEnd, lun: &Lun<'_>) -> Ticket {
    let ticket = fe.submit(REQUESTS, &lun.request(cdb::write16(0, 8)).data_out(vec![1; BLOCK]));
    eventually("the write is taken over", || {
        fe.diagnosis().log().contains("does not come back from a write")
    });
    ticket
}

/// Another guest's stopping queue, which waits for a hung disk, does not hold up a reset of another disk.
#[test]
fn a_reset_does_not_wait_for_another_guests_hung_disk() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 2, "fault=write:stall-ms-6000*1");
    let fe = FrontEnd::builder().queues(2).connect(&served);
    let hangs = fe.ready_lun(0, 0);
    let other = second(&scratch, &served);
    let unit = other.ready_lun(0, 1);
    let write = hang(&fe, &hangs);
    fe.hang_up();
    for _ in 0..20 {
        let code = other.tmf(Tmf::LogicalUnitReset, unit.address, 0);
        assert_eq!(code, response::FUNCTION_COMPLETE);
    }
    assert!(fe.queue(REQUESTS).try_take(write).is_none(), "it waited for what hangs");
}

/// The same with the queues of one guest: GET_VRING_BASE of a queue that hangs.
#[test]
fn functions_do_not_wait_for_a_hung_queue_that_is_being_stopped() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 2, "fault=write:stall-ms-6000*1");
    let fe = FrontEnd::builder().queues(2).connect(&served);
    let hangs = fe.ready_lun(0, 0);
    let unit = fe.ready_lun(0, 1);
    let write = hang(&fe, &hangs);
    std::thread::scope(|scope| {
        scope.spawn(|| fe.stop_queue(REQUESTS));
        for _ in 0..20 {
            let code = fe.tmf(Tmf::AbortTask, unit.address, 77);
            assert_eq!(code, response::FUNCTION_COMPLETE);
        }
        assert!(fe.queue(REQUESTS).try_take(write).is_none(), "it waited for what hangs");
    });
}

/// Functions that come while everything is being stopped.
#[test]
fn functions_beside_a_reset_of_the_device() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 2, "");
    let fe = FrontEnd::builder().queues(2).connect(&served);
    let address = fe.ready_lun(0, 0).address;
    for round in 0..400u64 {
        {
            let mut control = fe.queue(CONTROL_QUEUE);
            for tag in 0..20 + round % 20 {
                control.try_enqueue(&Tmf::AbortTask.exchange(address, tag));
            }
            control.publish();
        }
        let until = Instant::now() + Duration::from_micros(round % 50 * 4);
        while Instant::now() < until {}
        fe.set(request::RESET_DEVICE, &[], &[], true);
        fe.reset_queues();
        fe.start();
    }
}

// ----- stress ---------------------------------------------------------------------------------

struct Out {
    lun: u16,
    tag: u64,
    queue: usize,
    ticket: Ticket,
}

/// Random commands, stalls, functions, stops of rings, memory that goes and comes, two guests.
fn stress(seed: u64, seconds: u64) {
    let scratch = Scratch::new();
    for name in ["0.img", "1.img", "2.img", "3.img"] {
        scratch.file(name, &blocks(0, SIZE as usize / 512, 512, 1));
    }
    let served = Daemon::builder(&scratch)
        .disk(&scratch.join("0.img"), "fault=write:stall-ms-40@0-2097152")
        .disk(&scratch.join("1.img"), "fault=write:stall-ms-25@0-1048576")
        .disk(&scratch.join("2.img"), "cache=direct")
        .disk(&scratch.join("3.img"), "")
        .arg("--num-queues=3")
        .arg(format!("--socket-path={}", scratch.join("other.sock").display()))
        .spawn();
    let fe = FrontEnd::builder()
        .queues(3)
        .inflight()
        .memory(RegionSpec::single(), MemoryMessage::Slots)
        .connect(&served);
    let other = second(&scratch, &served);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let other = &other;
        scope.spawn(move || {
            let mut rng = Rng::new(seed + 1000);
            let luns: Vec<_> = (0..4).map(|n| other.ready_lun(0, n)).collect();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let lun = &luns[rng.below(4) as usize];
                let lba = rng.below(SIZE / 4096) * 8;
                match rng.below(4) {
                    0 => drop(lun.run_out(cdb::write16(lba, 8), &vec![9; BLOCK])),
                    1 => drop(lun.run_in(cdb::read16(lba, 8), BLOCK)),
                    2 if rng.below(8) == 0 => {
                        let code = other.tmf(Tmf::LogicalUnitReset, lun.address, 0);
                        assert_eq!(code, response::FUNCTION_COMPLETE);
                    }
                    _ => drop(lun.run(cdb::test_unit_ready())),
                }
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            one_guest(&fe, seed, seconds);
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Err(e) = done {
            std::panic::resume_unwind(e);
        }
    });
}

fn one_guest(fe: &FrontEnd, seed: u64, seconds: u64) {
    let mut rng = Rng::new(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut out: Vec<Out> = Vec::new();
    let mut told = std::collections::HashMap::<u8, u64>::new();
    let (mut functions, mut stops) = (0, 0);
    while Instant::now() < until {
        for _ in 0..rng.below(16) {
            let lun = rng.below(4) as u16;
            let tag = fe.new_tag();
            let lba = rng.below(SIZE / 4096) * 8;
            let unit = fe.lun(0, lun);
            let unit = match rng.below(2) {
                0 => unit.with_shape(Shape::default().aligned(4096)),
                _ => unit,
            };
            let mut r = match rng.below(8) {
                0..=2 => unit.request(cdb::write16(lba, 8)).data_out(vec![7; BLOCK]),
                3 => unit.request(cdb::synchronize_cache10(0, 0)),
                4 => unit.request(cdb::test_unit_ready()),
                _ => unit.request(cdb::read16(lba, 8)).data_in(BLOCK),
            };
            r = match rng.below(12) {
                0 => r.attribute(TaskAttribute::Ordered),
                1 => r.attribute(TaskAttribute::HeadOfQueue),
                _ => r,
            };
            let queue = REQUESTS + rng.below(3) as usize;
            let ticket = fe.submit(queue, &r.tag(tag));
            out.push(Out { lun, tag, queue, ticket });
        }
        if rng.below(3) == 0 {
            std::thread::sleep(Duration::from_millis(rng.below(12)));
        }
        match rng.below(6) {
            0 if !out.is_empty() => {
                let about = &out[rng.below(out.len() as u64) as usize];
                let (lun, tag) = (about.lun, about.tag);
                let f = [
                    Tmf::AbortTask,
                    Tmf::AbortTaskSet,
                    Tmf::LogicalUnitReset,
                    Tmf::ItNexusReset,
                    Tmf::QueryTask,
                ][rng.below(5) as usize];
                let code = fe.tmf(f, Address::flat(0, lun), tag);
                functions += 1;
                if matches!(f, Tmf::QueryTask) {
                    assert!(
                        code == response::FUNCTION_COMPLETE || code == response::FUNCTION_SUCCEEDED
                    );
                } else {
                    assert_eq!(code, response::FUNCTION_COMPLETE);
                    let all = std::mem::take(&mut out);
                    for o in all {
                        let about = match f {
                            Tmf::AbortTask => o.tag == tag,
                            Tmf::ItNexusReset => true,
                            _ => o.lun == lun,
                        };
                        if !about {
                            out.push(o);
                            continue;
                        }
                        let a = fe.queue(o.queue).try_take(o.ticket).unwrap_or_else(|| {
                            fe.diagnosis()
                                .fail(&format!("{f:?} answered, command {} goes on", o.tag))
                        });
                        *told.entry(ScsiResponse::parse(&a).response).or_default() += 1;
                    }
                }
            }
            1 if rng.below(3) == 0 => {
                let q = REQUESTS + rng.below(3) as usize;
                match rng.below(2) {
                    0 => {
                        let base = fe.stop_queue(q);
                        fe.start_queue(q, base);
                        // Before that was heard the ring is one that the front end has taken back.
                        fe.barrier();
                    }
                    _ => {
                        fe.enable_queue(q, false);
                        fe.enable_queue(q, true);
                    }
                }
                stops += 1;
            }
            2 if rng.below(3) == 0 => {
                let base = RegionSpec::single()[0].base;
                fe.take_away(base);
                std::thread::sleep(Duration::from_millis(rng.below(5)));
                fe.give_back(base);
                stops += 1;
            }
            3 => fe.renew_call(REQUESTS + rng.below(3) as usize),
            _ => {}
        }
        if out.len() > 60 {
            while out.len() > 20 {
                let o = out.swap_remove(rng.below(out.len() as u64) as usize);
                let a = fe.queue(o.queue).wait(o.ticket);
                *told.entry(ScsiResponse::parse(&a).response).or_default() += 1;
            }
        }
    }
    for o in out {
        let a = fe.queue(o.queue).wait(o.ticket);
        *told.entry(ScsiResponse::parse(&a).response).or_default() += 1;
    }
    println!("seed {seed}: {functions} functions, {stops} stops, answers {told:?}");
}

#[test]
fn stress_of_queues() {
    for seed in 0..2 {
        stress(seed, 10);
    }
}

/// Commands that were taken from a ring before its memory went away for a moment are served when it is back.
#[test]
fn commands_taken_before_memory_goes_away_are_served() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 1, "fault=write:stall-ms-1000*1");
    let fe = FrontEnd::builder()
        .queues(1)
        .memory(RegionSpec::single(), MemoryMessage::Slots)
        .connect(&served);
    let (hangs, unit) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let tickets: Vec<Ticket> = {
        let write = hangs.request(cdb::write16(0, 8)).data_out(vec![1; BLOCK]);
        let write2 = unit.request(cdb::write16(64, 8)).data_out(vec![2; BLOCK]);
        let read = unit.request(cdb::read16(8, 8)).data_in(BLOCK);
        let mut queue = fe.queue(REQUESTS);
        let all = [write.exchange(), write2.exchange(), read.exchange(), read.exchange()];
        let tickets = all.iter().map(|e| queue.enqueue(e)).collect();
        queue.publish();
        tickets
    };
    fe.take_away(0);
    std::thread::sleep(A_MOMENT);
    fe.give_back(0);
    for ticket in tickets {
        let answer = fe.wait(ticket);
        assert!(answer.is_good(), "{answer:?}");
    }
}

/// Functions that come while the connection ends: those that are answered have ended what they are about.
#[test]
fn functions_beside_the_end_of_a_connection() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 3, "fault=read:delay-ms-2");
    let mut fe = FrontEnd::builder().queues(3).inflight().connect(&served);
    fe.ready_lun(0, 0);
    let mut rng = Rng::new(5);
    let (mut early, mut late) = (0, 0);
    for round in 0..300u64 {
        let mut out = Vec::new();
        for n in 0..rng.below(40) {
            let tag = fe.new_tag();
            let lba = rng.below(SIZE / 4096) * 8;
            let read = fe.lun(0, 0).request(cdb::read16(lba, 8)).data_in(BLOCK).tag(tag);
            out.push((tag, fe.submit(REQUESTS + (n % 3) as usize, &read)));
        }
        let count = 1 + rng.below(20);
        let functions: Vec<Ticket> = {
            let mut control = fe.queue(CONTROL_QUEUE);
            let exchange = Tmf::AbortTaskSet.exchange(Address::flat(0, 0), 0);
            let all = (0..count).map(|_| control.enqueue(&exchange)).collect();
            control.publish();
            all
        };
        let until = Instant::now() + Duration::from_micros(rng.below(150));
        while Instant::now() < until {}
        // All that this connection answers comes before it is closed.
        let socket = fe.channel().socket().try_clone().unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let closed = std::io::Read::read(&mut &socket, &mut [0; 8]);
        assert!(matches!(closed, Ok(0)), "round {round}: the connection does not end: {closed:?}");
        let mut answered = 0;
        for &function in &functions {
            if let Some(done) = fe.queue(CONTROL_QUEUE).try_take(function) {
                assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
                answered += 1;
            }
        }
        if answered > 0 {
            early += 1;
            for (tag, ticket) in &out {
                assert!(fe.queue(ticket.queue).peek(*ticket), "round {round}: {tag} goes on");
            }
        } else {
            late += 1;
        }
        fe.reconnect(&served);
        let missing = functions.len() - answered;
        for function in functions.into_iter().rev().take(missing) {
            let done = fe.queue(CONTROL_QUEUE).wait(function);
            assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
        }
        for (_, ticket) in out {
            fe.wait(ticket);
        }
    }
    println!("{early} rounds with functions answered before the end, {late} without");
    assert!(early > 0 && late > 0, "nothing was proved");
}

/// Rings that their front end has taken back hold up no function: a guest may start fewer of them the next time.
#[test]
fn functions_do_not_wait_for_rings_that_were_taken_back() {
    for reset in [false, true] {
        let scratch = Scratch::new();
        images(&scratch);
        let served = daemon(&scratch, 2, "");
        let mut fe = FrontEnd::builder().queues(2).connect(&served);
        fe.ready_lun(0, 0);
        if reset {
            fe.set(request::RESET_DEVICE, &[], &[], true);
            fe.reset_queues();
            fe.start_only(Some(&[CONTROL_QUEUE, 1, REQUESTS]));
            fe.start();
        } else {
            fe.stop_queue(REQUESTS + 1);
        }
        let lun = fe.ready_lun(0, 0);
        for function in [Tmf::AbortTask, Tmf::ClearTaskSet, Tmf::LogicalUnitReset] {
            assert_eq!(fe.tmf(function, lun.address, 0), response::FUNCTION_COMPLETE);
        }
    }
}

/// Without memory for requests in flight nobody takes a function over: it is answered before the connection ends.
#[test]
fn a_function_that_nobody_takes_over_is_answered() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 1, "fault=write:stall-ms-2000*1");
    let fe = FrontEnd::builder().queues(1).connect(&served);
    let lun = fe.ready_lun(0, 0);
    let write = hang(&fe, &lun);
    let answer = fe.queue(CONTROL_QUEUE).submit(&Tmf::LogicalUnitReset.exchange(lun.address, 0));
    eventually("the function is taken", || {
        let queue = fe.queue(CONTROL_QUEUE);
        queue.ring().avail_event() == queue.ring().published()
    });
    fe.hang_up();
    eventually("the end of the connection", || {
        let log = served.log();
        log.contains("front end is gone") || log.contains("connection ended")
    });
    let done = fe.queue(CONTROL_QUEUE).try_take(answer).expect("answered at the end");
    assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
    assert!(fe.queue(REQUESTS).try_take(write).is_some(), "ended before the function");
}

/// A front end that sees its connection end takes what is answered by then for all there is.
#[test]
fn a_connection_is_closed_when_all_is_answered() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 1, "fault=write:stall-ms-2000*1");
    let fe = FrontEnd::builder().queues(1).connect(&served);
    let lun = fe.ready_lun(0, 0);
    let write = hang(&fe, &lun);
    let socket = fe.channel().socket().try_clone().unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(std::io::Read::read(&mut &socket, &mut [0; 8]), Ok(0)));
    assert!(fe.queue(REQUESTS).try_take(write).is_some(), "it was answered later");
}

/// What lies in a ring that rests for a while is in its task set: a function waits for the ring.
#[test]
fn a_function_waits_for_a_ring_that_rests() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 2, "");
    let fe = FrontEnd::builder().queues(2).connect(&served);
    let lun = fe.ready_lun(0, 0);
    fe.enable_queue(REQUESTS + 1, false);
    let read = lun.request(cdb::read16(8, 8)).data_in(BLOCK).tag(9);
    let read = fe.submit(REQUESTS + 1, &read);
    let answer = fe.queue(CONTROL_QUEUE).submit(&Tmf::AbortTask.exchange(lun.address, 9));
    std::thread::sleep(A_MOMENT);
    assert!(fe.queue(CONTROL_QUEUE).try_take(answer).is_none(), "answered before the ring runs");
    fe.enable_queue(REQUESTS + 1, true);
    let done = fe.queue(CONTROL_QUEUE).wait(answer);
    assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
    let read = fe.queue(REQUESTS + 1).try_take(read).expect("ended before the function");
    assert_eq!(ScsiResponse::parse(&read).response, response::ABORTED);
}

/// The same while the ring is only coming to rest: the function does not wait for what hangs there, and what lies there ends
/// unbegun when it starts again.
#[test]
fn what_lies_in_a_ring_that_stops_ends_with_its_function() {
    for _ in 0..10 {
        let scratch = Scratch::new();
        images(&scratch);
        let served = daemon(&scratch, 2, "fault=write:stall-ms-4000*1");
        let fe = FrontEnd::builder().queues(2).connect(&served);
        let (hangs, unit) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
        let write = hang(&fe, &hangs);
        let read = std::thread::scope(|scope| {
            scope.spawn(|| {
                fe.enable_queue(REQUESTS, false);
                fe.barrier();
            });
            std::thread::sleep(A_MOMENT);
            let read = unit.request(cdb::read16(8, 8)).data_in(BLOCK).tag(9);
            let read = fe.submit(REQUESTS, &read);
            let code = fe.tmf(Tmf::AbortTask, unit.address, 9);
            assert_eq!(code, response::FUNCTION_COMPLETE);
            read
        });
        fe.wait(write);
        fe.enable_queue(REQUESTS, true);
        let read = fe.wait(read);
        // If it was taken after all, the ring had not begun to stop by then.
        if !read.is_good() {
            assert_eq!(read.response, response::ABORTED);
            assert_same(&read.buffer, &[POISON; BLOCK], "a command that has not begun");
            return;
        }
    }
    panic!("nothing was proved");
}

/// What a process has left in flight is of the life of the guest that ends with a reset of the device, even if its ring looks
/// the same afterwards.
#[test]
fn what_was_left_in_flight_ends_with_a_reset() {
    let scratch = Scratch::new();
    images(&scratch);
    let mut served = daemon(&scratch, 1, "fault=write:stall-ms-60000*1");
    let mut fe = FrontEnd::builder().queues(1).inflight().connect(&served);
    let write = {
        let lun = fe.ready_lun(0, 0);
        hang(&fe, &lun)
    };
    served.kill();
    let served = daemon(&scratch, 1, "");
    fe.reconnect_without_enabling(&served);
    fe.set(request::RESET_DEVICE, &[], &[], true);
    fe.start_only(Some(&[CONTROL_QUEUE, 1]));
    fe.start();
    let base = fe.queue(REQUESTS).ring().published();
    fe.start_queue(REQUESTS, base);
    fe.enable_queue(REQUESTS, true);
    fe.barrier();
    fe.lun(0, 0).run(cdb::test_unit_ready());
    assert!(fe.queue(REQUESTS).try_take(write).is_none(), "it was done again");
    assert!(!served.log().contains("were left in flight"), "{}", served.log());
}
