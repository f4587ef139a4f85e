//! Task management while queues are only starting: a daemon that was away finds commands, and functions that are about
//! them, in rings that it starts one after another. When a function is answered, what it ended has ended, whichever ring
//! it lay in: the driver uses those buffers for something else from then on.

mod frontend;

use std::os::unix::net::UnixStream;

use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE as REQUESTS};
use frontend::control::tmf_response;
use frontend::daemon::Scratch;
use frontend::pattern::{Rng, assert_same, blocks};
use frontend::queue::{POISON, Ticket};
use frontend::scsi::{key, response};
use frontend::*;
use nix::sys::signal::Signal;

const SIZE: u64 = 4 * MIB;
const BLOCK: usize = 4096;

fn daemon(scratch: &Scratch, queues: usize, options: &str) -> Daemon {
    Daemon::builder(scratch)
        .disk(&scratch.join("0.img"), "")
        .disk(&scratch.join("1.img"), options)
        .arg(format!("--num-queues={queues}"))
        .arg(format!("--socket-path={}", scratch.join("other.sock").display()))
        .spawn()
}

fn images(scratch: &Scratch) {
    for name in ["0.img", "1.img"] {
        let data = blocks(0, SIZE as usize / 512, 512, 1);
        scratch.file(name, &data);
    }
}

/// A guest whose daemon has died, with a command in its second request queue, and a function about it.
fn away(scratch: &Scratch, function: Tmf) -> (FrontEnd, Ticket, Ticket) {
    images(scratch);
    let mut served = daemon(scratch, 2, "");
    let fe = FrontEnd::builder().queues(2).inflight().connect(&served);
    let lun = fe.ready_lun(0, 0);
    served.kill();
    let read = lun.request(cdb::read16(8, 8)).data_in(BLOCK).tag(9);
    let read = fe.submit(REQUESTS + 1, &read);
    let function = fe.queue(CONTROL_QUEUE).submit(&function.exchange(lun.address, 9));
    (fe, read, function)
}

#[track_caller]
fn assert_never_began(read: &ScsiResponse, response: u8, what: &str) {
    assert_eq!(read.response, response, "{what}");
    assert_same(&read.buffer, &[POISON; BLOCK], what);
}

#[test]
fn a_function_waits_for_rings_that_are_starting() {
    for (function, ends) in [
        (Tmf::AbortTask, response::ABORTED),
        (Tmf::AbortTaskSet, response::ABORTED),
        (Tmf::ClearTaskSet, response::ABORTED),
        (Tmf::LogicalUnitReset, response::RESET),
        (Tmf::ItNexusReset, response::RESET),
    ] {
        let scratch = Scratch::new();
        let (mut fe, read, answer) = away(&scratch, function);
        let served = daemon(&scratch, 2, "");
        fe.reconnect_without_enabling(&served);
        let answered = |limit| {
            std::thread::sleep(limit);
            fe.queue(CONTROL_QUEUE).try_take(answer)
        };
        fe.enable_queue(CONTROL_QUEUE, true);
        assert!(answered(A_MOMENT).is_none(), "{function:?}: answered before the ring starts");
        fe.enable_queue(REQUESTS, true);
        assert!(answered(A_MOMENT).is_none(), "{function:?}: another ring has started");
        fe.enable_queue(REQUESTS + 1, true);
        let done = fe.queue(CONTROL_QUEUE).wait(answer);
        assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE, "{function:?}");
        let read = fe.queue(REQUESTS + 1).try_take(read).expect("ended before the function");
        let read = ScsiResponse::parse(&read);
        assert_never_began(&read, ends, &format!("{function:?}"));
    }
}

/// Whether a ring starts is up to the front end: it can take the control queue back, or go, with a function that waits.
#[test]
fn a_function_that_waits_for_a_ring_holds_up_no_end() {
    let scratch = Scratch::new();
    let (mut fe, read, answer) = away(&scratch, Tmf::AbortTask);
    let mut served = daemon(&scratch, 2, "");
    fe.reconnect_without_enabling(&served);
    fe.enable_queue(CONTROL_QUEUE, true);
    eventually("the function is taken", || {
        let queue = fe.queue(CONTROL_QUEUE);
        queue.ring().avail_event() == queue.ring().published()
    });
    fe.stop_queue(CONTROL_QUEUE);
    let done = fe.queue(CONTROL_QUEUE).try_take(answer).expect("answered at the end");
    assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
    // What it was about is not done any more when its ring starts after all.
    fe.enable_queue(REQUESTS + 1, true);
    let read = ScsiResponse::parse(&fe.queue(REQUESTS + 1).wait(read));
    assert_never_began(&read, response::ABORTED, "its function has ended");
    drop(fe);
    assert!(served.terminate().success());

    let scratch = Scratch::new();
    let (mut fe, ..) = away(&scratch, Tmf::LogicalUnitReset);
    let mut served = daemon(&scratch, 2, "");
    fe.reconnect_without_enabling(&served);
    fe.enable_queue(CONTROL_QUEUE, true);
    assert!(served.terminate().success(), "{}", served.log());
}

/// The reset of a disk by another guest ends what lies in rings that are starting, and does not wait for them.
#[test]
fn a_reset_by_another_guest_reaches_rings_that_are_starting() {
    let scratch = Scratch::new();
    let (mut fe, read, _) = away(&scratch, Tmf::QueryTask);
    let served = daemon(&scratch, 2, "");
    let mut stream = None;
    eventually("the second socket", || {
        stream = UnixStream::connect(scratch.join("other.sock")).ok();
        stream.is_some()
    });
    let other = FrontEnd::builder().queues(1).attach(stream.unwrap(), served.diagnosis());
    let unit = other.ready_lun(0, 0);
    fe.reconnect_without_enabling(&served);
    fe.barrier();
    for _ in 0..3 {
        let code = other.tmf(Tmf::LogicalUnitReset, unit.address, 0);
        assert_eq!(code, response::FUNCTION_COMPLETE);
    }
    (0..4).for_each(|queue| fe.enable_queue(queue, true));
    let read = ScsiResponse::parse(&fe.queue(REQUESTS + 1).wait(read));
    assert_never_began(&read, response::RESET, "the disk was reset");
    fe.lun(0, 0).on_queue(REQUESTS + 1).clear_unit_attentions();
    fe.lun(0, 0).on_queue(REQUESTS + 1).read16(0, 8);
}

/// A command in flight, or waiting for the daemon, by the disk and the tag that functions know it by.
struct Waiting {
    lun: u16,
    tag: u64,
    ticket: Ticket,
}

/// A guest that gives commands and functions to daemons that come and go.
struct Guest {
    fe: FrontEnd,
    rng: Rng,
    queues: u64,
    waiting: Vec<Waiting>,
    ended: usize,
    done: usize,
}

impl Guest {
    fn submit(&mut self, count: u64) {
        for _ in 0..count {
            let (lun, tag) = (self.rng.below(2) as u16, self.fe.new_tag());
            let lba = self.rng.below(SIZE / BLOCK as u64) * 8;
            let unit = self.fe.lun(0, lun);
            let request = match self.rng.below(8) {
                0 => unit.request(cdb::write16(lba, 8)).data_out(blocks(lba, 8, 512, 1)),
                1 => unit.request(cdb::synchronize_cache10(0, 0)),
                2 => unit.request(cdb::test_unit_ready()),
                _ => unit.request(cdb::read16(lba, 8)).data_in(BLOCK),
            };
            let queue = REQUESTS + self.rng.below(self.queues) as usize;
            let ticket = self.fe.submit(queue, &request.tag(tag));
            self.waiting.push(Waiting { lun, tag, ticket });
        }
    }

    /// Gives some functions, about anything that waits.
    fn functions(&mut self) -> Vec<(Tmf, u16, u64, Ticket)> {
        let count = 1 + self.rng.below(3);
        let give = |_| {
            let about = &self.waiting[self.rng.below(self.waiting.len() as u64) as usize];
            let function = match self.rng.below(6) {
                0 => Tmf::AbortTaskSet,
                1 => Tmf::ClearTaskSet,
                2 => Tmf::LogicalUnitReset,
                3 => Tmf::ItNexusReset,
                4 => Tmf::QueryTask,
                _ => Tmf::AbortTask,
            };
            let exchange = function.exchange(Address::flat(0, about.lun), about.tag);
            let ticket = self.fe.queue(CONTROL_QUEUE).submit(&exchange);
            (function, about.lun, about.tag, ticket)
        };
        (0..count).map(give).collect()
    }

    /// Takes an answer that is there, or waits for it.
    fn take(&mut self, at: usize, must_be_there: Option<&str>) {
        let Waiting { ticket, tag, .. } = self.waiting.swap_remove(at);
        let mut queue = self.fe.queue(ticket.queue);
        let answer = match must_be_there {
            None => queue.wait(ticket),
            Some(why) => queue.try_take(ticket).unwrap_or_else(|| {
                self.fe.diagnosis().fail(&format!("{why}, and command {tag} goes on"))
            }),
        };
        let answer = ScsiResponse::parse(&answer);
        match answer.response {
            response::ABORTED | response::RESET => self.ended += 1,
            response::OK if answer.is_good() => self.done += 1,
            _ => assert_eq!(answer.sense_code().map(|code| code.0), Some(key::UNIT_ATTENTION)),
        }
    }
}

/// Half of the daemons end in order, half are killed, with commands and functions of every kind queued while they are
/// away. No function fails, and when it is answered, nothing that it ended goes on.
fn a_thousand_restarts(queues: usize, rounds: usize) {
    let scratch = Scratch::new();
    images(&scratch);
    let slow = "fault=read:delay-ms-2";
    let mut served = daemon(&scratch, queues, slow);
    let fe = FrontEnd::builder().queues(queues).inflight().connect(&served);
    let (rng, queues) = (Rng::new(queues as u64), queues as u64);
    let mut guest = Guest { fe, rng, queues, waiting: Vec::new(), ended: 0, done: 0 };
    let mut functions = 0;
    for round in 0..rounds {
        let count = guest.rng.below(12);
        guest.submit(count);
        match round % 2 {
            0 => assert!(served.end_with(Signal::SIGTERM).success()),
            _ => served.kill(),
        }
        let count = 1 + guest.rng.below(24);
        guest.submit(count);
        let given = guest.functions();
        served = daemon(&scratch, queues as usize, slow);
        guest.fe.reconnect(&served);
        for (function, lun, tag, ticket) in given {
            let answer = tmf_response(&guest.fe.queue(CONTROL_QUEUE).wait(ticket));
            let found = answer == response::FUNCTION_SUCCEEDED && function == Tmf::QueryTask;
            assert!(answer == response::FUNCTION_COMPLETE || found, "{function:?}: {answer}");
            functions += 1;
            let about = |waiting: &Waiting| match function {
                Tmf::QueryTask => false,
                Tmf::AbortTask => (waiting.lun, waiting.tag) == (lun, tag),
                Tmf::ItNexusReset => true,
                _ => waiting.lun == lun,
            };
            while let Some(at) = guest.waiting.iter().position(about) {
                guest.take(at, Some(&format!("round {round}: {function:?} is answered")));
            }
        }
        while !guest.waiting.is_empty() {
            guest.take(0, None);
        }
    }
    let Guest { ended, done, .. } = guest;
    println!(
        "{queues} queues, {rounds} restarts: {functions} functions ended {ended} commands, \
         {done} were done"
    );
    assert!(ended > rounds && done > rounds, "nothing was proved");
}

#[test]
fn a_thousand_restarts_with_1_and_2_queues() {
    a_thousand_restarts(1, 150);
    a_thousand_restarts(2, 200);
}

#[test]
fn a_thousand_restarts_with_4_and_8_queues() {
    a_thousand_restarts(4, 200);
    a_thousand_restarts(8, 200);
}

#[test]
fn a_thousand_restarts_with_16_queues() {
    a_thousand_restarts(16, 250);
}

/// The first message about a ring is enough for functions to wait for it.
#[test]
fn a_function_waits_for_a_ring_that_is_told_of() {
    let scratch = Scratch::new();
    images(&scratch);
    let served = daemon(&scratch, 2, "");
    let fe = FrontEnd::builder().queues(2).connect(&served);
    let lun = fe.ready_lun(0, 0);
    for message in [RingMessage::Num, RingMessage::Base, RingMessage::Addr, RingMessage::Kick] {
        let base = fe.stop_queue(REQUESTS + 1);
        let read = lun.request(cdb::read16(8, 8)).data_in(BLOCK).tag(9);
        let read = fe.submit(REQUESTS + 1, &read);
        fe.tell(REQUESTS + 1, message, base);
        fe.barrier();
        let answer = fe.queue(CONTROL_QUEUE).submit(&Tmf::AbortTask.exchange(lun.address, 9));
        std::thread::sleep(A_MOMENT);
        let early = fe.queue(CONTROL_QUEUE).try_take(answer);
        assert!(early.is_none(), "{message:?}: answered before the ring starts");
        fe.start_queue(REQUESTS + 1, base);
        let done = fe.queue(CONTROL_QUEUE).wait(answer);
        assert_eq!(tmf_response(&done), response::FUNCTION_COMPLETE);
        let read = fe.queue(REQUESTS + 1).try_take(read).expect("ended before the function");
        let read = ScsiResponse::parse(&read);
        assert_never_began(&read, response::ABORTED, &format!("{message:?}"));
    }
}

/// The reset of a disk by another guest ends what lies in rings that rest while others run. What lies in rings that are not
/// told of was never received, and is told of the reset when it is.
#[test]
fn a_reset_by_another_guest_reaches_rings_that_do_not_run() {
    for rests in [true, false] {
        let scratch = Scratch::new();
        images(&scratch);
        let served = daemon(&scratch, 2, "");
        let fe = FrontEnd::builder().queues(2).connect(&served);
        let lun = fe.ready_lun(0, 0);
        let mut stream = None;
        eventually("the second socket", || {
            stream = UnixStream::connect(scratch.join("other.sock")).ok();
            stream.is_some()
        });
        let other = FrontEnd::builder().queues(1).attach(stream.unwrap(), served.diagnosis());
        let unit = other.ready_lun(0, 0);
        match rests {
            true => fe.enable_queue(REQUESTS + 1, false),
            false => drop(fe.stop()),
        }
        let read = lun.request(cdb::read16(8, 8)).data_in(BLOCK);
        let read = fe.submit(REQUESTS + 1, &read);
        let code = other.tmf(Tmf::LogicalUnitReset, unit.address, 0);
        assert_eq!(code, response::FUNCTION_COMPLETE);
        match rests {
            true => fe.enable_queue(REQUESTS + 1, true),
            false => fe.start(),
        }
        let read = ScsiResponse::parse(&fe.queue(REQUESTS + 1).wait(read));
        match rests {
            true => assert_never_began(&read, response::RESET, "the disk was reset"),
            false => drop(read.expect_sense((6, 0x29, 0))),
        }
    }
}
