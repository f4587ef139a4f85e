//! The control queue: task management functions on idle units and under load, asynchronous
//! notification; and the event queue.

mod frontend;
mod mounts;

use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::thread;

use frontend::connection::{CONTROL_QUEUE, FIRST_REQUEST_QUEUE as REQUESTS};
use frontend::control::event;
use frontend::daemon::host_read;
use frontend::pattern::{assert_same, blocks};
use frontend::protocol::feature;
use frontend::queue::POISON;
use frontend::scsi::{response, sense, status};
use frontend::*;
use mounts::fuse::Fuse;

const DISK: u64 = 32 * MIB;
/// Blocks of one request under load: 128 KiB.
const LARGE: u16 = 256;

const QUEUES: usize = 2;

fn setup() -> (Daemon, FrontEnd) {
    serve("")
}

/// What commands take there, so that functions meet them. Of more commands than a disk has threads some have not begun then.
const SLOW: &str = "fault=any:delay-ms-100";

fn setup_slow() -> (Daemon, FrontEnd) {
    serve(SLOW)
}

fn serve(options: &str) -> (Daemon, FrontEnd) {
    let daemon = Daemon::with_disk(DISK, options);
    let fe = FrontEnd::builder().queues(QUEUES).connect(&daemon);
    (daemon, fe)
}

/// Where the host has no way to zero a range but to write it, a command that zeroes gigabytes ends early all the same.
#[test]
fn zeroes_that_have_to_be_written_can_be_aborted() {
    let size = 4 * GIB;
    let Some(fuse) = Fuse::new(false) else { return };
    fuse.refuse();
    let scratch = Scratch::new();
    let (path, behind) = (fuse.path().join("disk.img"), fuse.behind().join("disk.img"));
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let daemon = Daemon::builder(&scratch).disk(&path, "").spawn();
    let fe = FrontEnd::connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    let zeroes = lun.request(cdb::write_same16(1, 0, (size / 512) as u32));
    let ticket = lun.submit(&zeroes);
    let written = || behind.metadata().unwrap().blocks() * 512;
    eventually("it has begun", || written() > 0);
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, lun.address, 0), response::OK);
    let answer = fe.queue(ticket.queue).try_take(ticket).expect("ended before");
    assert_eq!(ScsiResponse::parse(&answer).response, response::ABORTED);
    assert!(written() < size / 2, "{} bytes were written all the same", written());
}

// ----- on idle units --------------------------------------------------------------------------

#[test]
fn functions_on_an_idle_unit() {
    let (_daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    let expected = [
        (Tmf::AbortTask, response::FUNCTION_COMPLETE),
        (Tmf::AbortTaskSet, response::FUNCTION_COMPLETE),
        (Tmf::ClearAca, response::FUNCTION_REJECTED),
        (Tmf::ClearTaskSet, response::FUNCTION_COMPLETE),
        (Tmf::QueryTask, response::FUNCTION_COMPLETE),
        (Tmf::QueryTaskSet, response::FUNCTION_COMPLETE),
    ];
    for (function, code) in expected {
        assert_eq!(fe.tmf(function, lun.address, 0x1234), code, "{function:?}");
        assert_eq!(lun.clear_unit_attentions(), [], "{function:?} resets nothing");
    }
    for function in [Tmf::LogicalUnitReset, Tmf::ItNexusReset] {
        assert_eq!(fe.tmf(function, lun.address, 0), response::FUNCTION_COMPLETE, "{function:?}");
        let found = lun.clear_unit_attentions();
        assert_eq!(found.len(), 1, "{function:?}: {found:02x?}");
        assert_eq!(found[0].0, 0x29, "{function:?}: {found:02x?}");
    }
}

#[test]
fn functions_on_units_that_are_not_there() {
    let (_daemon, fe) = setup();
    let with_lun = [
        Tmf::AbortTask,
        Tmf::AbortTaskSet,
        Tmf::ClearTaskSet,
        Tmf::LogicalUnitReset,
        Tmf::QueryTask,
        Tmf::QueryTaskSet,
    ];
    for function in with_lun {
        let code = fe.tmf(function, Address::flat(0, 7), 1);
        assert_eq!(code, response::INCORRECT_LUN, "{function:?}");
    }
    for function in with_lun.into_iter().chain([Tmf::ItNexusReset]) {
        let code = fe.tmf(function, Address::flat(9, 0), 1);
        assert_eq!(code, response::BAD_TARGET, "{function:?}");
    }
    // The nexus of a target is the target's, whatever the unit.
    assert_eq!(fe.tmf(Tmf::ItNexusReset, Address::flat(0, 7), 0), response::FUNCTION_COMPLETE);
}

#[test]
fn functions_that_do_not_exist_are_rejected() {
    let (_daemon, fe) = setup();
    for subtype in [8, 9, 255, u32::MAX] {
        let exchange = control::tmf_exchange(subtype, Address::flat(0, 0), 0);
        let code = control::tmf_response(&fe.control(&exchange));
        assert_eq!(code, response::FUNCTION_REJECTED, "subtype {subtype}");
    }
}

#[test]
fn a_reset_is_the_units_own() {
    let scratch = Scratch::new();
    let mut builder = Daemon::builder(&scratch);
    for (number, options) in ["lun=0", "lun=1", "target=1,lun=0"].iter().enumerate() {
        builder = builder.disk(&scratch.image(&format!("{number}.img"), MIB), options);
    }
    let daemon = builder.spawn();
    let fe = FrontEnd::connect(&daemon);
    let units = [fe.ready_lun(0, 0), fe.ready_lun(0, 1), fe.ready_lun(1, 0)];
    let pending = || units.each_ref().map(|lun| lun.clear_unit_attentions().len());
    fe.tmf(Tmf::LogicalUnitReset, units[0].address, 0);
    assert_eq!(pending(), [1, 0, 0]);
    fe.tmf(Tmf::LogicalUnitReset, units[1].address, 0);
    assert_eq!(pending(), [0, 1, 0]);
    fe.tmf(Tmf::ItNexusReset, units[0].address, 0);
    assert_eq!(pending(), [1, 1, 0], "all units of the target");
    fe.tmf(Tmf::ItNexusReset, units[2].address, 0);
    assert_eq!(pending(), [0, 0, 1]);
}

#[test]
fn control_requests_may_be_cut_anywhere() {
    let (_daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    for cut in 1..24 {
        let mut exchange = Tmf::QueryTask.exchange(lun.address, 5);
        exchange.shape.readable = Cuts::At(vec![cut]);
        assert_eq!(control::tmf_response(&fe.control(&exchange)), response::FUNCTION_COMPLETE);
        let mut exchange = Notification::Query.exchange(lun.address, 0xff);
        exchange.shape.readable = Cuts::At(vec![cut % 16]);
        exchange.shape.writable = Cuts::At(vec![cut % 5]);
        assert_eq!(control::notification_response(&fe.control(&exchange)).1, response::OK);
    }
    let mut exchange = Tmf::QueryTask.exchange(lun.address, 5);
    exchange.shape = Shape { readable: Cuts::Every(1), ..Shape::default() }.indirect();
    assert_eq!(control::tmf_response(&fe.control(&exchange)), response::FUNCTION_COMPLETE);
}

#[test]
fn many_control_requests_at_once() {
    let (_daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    let mut queue = fe.queue(CONTROL_QUEUE);
    for round in 0..20 {
        for tag in 0..40 {
            queue.enqueue(&Tmf::ALL[(round + tag) % 8].exchange(lun.address, tag as u64));
        }
        queue.publish();
        assert_eq!(queue.wait_all().len(), 40);
    }
}

#[test]
fn control_requests_that_make_no_sense_are_returned() {
    let (mut daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    let exchange = |readable: Vec<u8>, writable| Exchange {
        readable_header: readable.len(),
        readable,
        writable,
        writable_header: writable,
        ..Exchange::default()
    };
    let unknown = [&99_u32.to_le_bytes()[..], &[0; 20]].concat();
    let tmf = Tmf::QueryTask.exchange(lun.address, 0).readable;
    let cases = [
        ("an unknown type", exchange(unknown, 5)),
        ("three bytes", exchange(vec![0; 3], 1)),
        ("a short function", exchange(tmf[..23].to_vec(), 1)),
        ("a function without room for the answer", exchange(tmf, 0)),
        ("room for an answer to nothing", exchange(vec![], 5)),
        ("a short notification", exchange(vec![1, 0, 0, 0, 1], 5)),
    ];
    for (what, exchange) in cases {
        println!("{what}");
        let completion = fe.control(&exchange);
        assert!(completion.used_len as usize <= exchange.writable, "{what}");
        assert_eq!(fe.tmf(Tmf::QueryTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
    }
    assert!(daemon.is_running());
}

// ----- under load -----------------------------------------------------------------------------

/// Fills all request queues with large requests and waits until the device has taken them in.
fn load(
    lun: &Lun<'_>,
    per_queue: usize,
    mut request: impl FnMut(u32) -> ScsiRequest,
) -> Vec<(Ticket, u64)> {
    let fe = lun.front_end();
    let mut tickets = Vec::new();
    for number in 0..QUEUES {
        let mut queue = fe.queue(REQUESTS + number);
        for place in 0..per_queue {
            let lba = (number * per_queue + place) as u32 * u32::from(LARGE);
            let request = request(lba);
            tickets.push((queue.enqueue(&request.exchange()), request.tag));
        }
        queue.publish();
    }
    tickets
}

/// Waits until the device says, by its event index, that it has taken everything from the ring.
fn wait_until_taken(fe: &FrontEnd) {
    for number in 0..QUEUES {
        let queue = fe.queue(REQUESTS + number);
        let taken = || queue.ring().avail_event() == queue.ring().published();
        eventually("all requests are taken", taken);
    }
}

/// Rounds in which functions meet commands, until they have met enough of them: on a busy machine many come too late.
#[track_caller]
fn rounds<T: std::fmt::Debug>(
    counts: &mut T,
    mut round: impl FnMut(u64, &mut T),
    enough: impl Fn(&T) -> bool,
) {
    for number in 0.. {
        if number >= 10 && enough(counts) {
            break;
        }
        assert!(number < 100, "functions met too little in {number} rounds: {counts:?}");
        round(number, counts);
    }
    println!("{counts:?}");
}

/// What may become of a command that a task management function met.
#[derive(Debug, Default, PartialEq, Eq)]
struct Fates {
    good: usize,
    aborted: usize,
    reset: usize,
    attention: usize,
    /// Of those that were ended, reads that had not begun, and never did.
    unbegun: usize,
}

impl Fates {
    #[track_caller]
    fn count(&mut self, response: &ScsiResponse) {
        let ended = [response::ABORTED, response::RESET].contains(&response.response);
        let untouched = response.buffer.iter().all(|byte| *byte == POISON);
        self.unbegun += usize::from(ended && untouched && !response.buffer.is_empty());
        match (response.response, response.status) {
            (response::OK, status::GOOD) => self.good += 1,
            (response::ABORTED, _) => self.aborted += 1,
            (response::RESET, _) => self.reset += 1,
            _ => {
                response.expect_sense(sense::POWER_ON_OR_RESET);
                self.attention += 1;
            }
        }
    }
}

#[track_caller]
fn fates(fe: &FrontEnd, tickets: &[(Ticket, u64)]) -> Fates {
    let mut fates = Fates::default();
    for &(ticket, _) in tickets {
        fates.count(&fe.wait(ticket));
    }
    fates
}

#[test]
fn a_reset_under_load_leaves_nothing_behind() {
    let (_daemon, fe) = setup_slow();
    let lun = fe.ready_lun(0, 0);
    let round = |round, sum: &mut Fates| {
        let read = |lba| lun.request(cdb::read10(lba, LARGE)).data_in(usize::from(LARGE) * 512);
        let tickets = load(&lun, 30, read);
        // Known to the unit or only in the ring: none is answered later than the function that ended it.
        if round % 2 == 0 {
            wait_until_taken(&fe);
        }
        assert_eq!(fe.tmf(Tmf::LogicalUnitReset, lun.address, 0), response::FUNCTION_COMPLETE);
        for number in 0..QUEUES {
            let queue = fe.queue(REQUESTS + number);
            let (published, used) = (queue.ring().published(), queue.ring().used_idx());
            assert_eq!(used, published, "round {round}: not all are answered");
        }
        let fates = fates(&fe, &tickets);
        let pending = lun.clear_unit_attentions();
        assert_eq!(
            fates.attention + pending.len(),
            1,
            "one unit attention: {fates:?}, {pending:02x?}"
        );
        assert_eq!(fates.aborted, 0, "a reset answers RESET, not ABORTED");
        sum.good += fates.good;
        sum.reset += fates.reset;
        sum.attention += fates.attention;
        sum.unbegun += fates.unbegun;
    };
    // The disk has threads for fewer than there are: what has not begun is not done any more.
    rounds(&mut Fates::default(), round, |sum| sum.reset > 100 && sum.unbegun > 50);
}

/// A write that was answered, in whatever way, does not change the disk any more.
#[test]
fn no_write_outlives_its_answer() {
    let (daemon, fe) = setup_slow();
    let lun = fe.ready_lun(0, 0);
    let span = 2 * 20 * u32::from(LARGE);
    let round = |round, (ended, unwritten): &mut (usize, usize)| {
        let old = |lba: u32| {
            let data = blocks(lba.into(), LARGE.into(), 512, round);
            lun.request(cdb::write10(lba, LARGE)).data_out(data)
        };
        let tickets = load(&lun, 20, old);
        let function = if round % 2 == 0 { Tmf::LogicalUnitReset } else { Tmf::AbortTaskSet };
        assert_eq!(fe.tmf(function, lun.address, 0), response::FUNCTION_COMPLETE);
        let fates = fates(&fe, &tickets);
        *ended += fates.aborted + fates.reset;
        let found = host_read(&daemon.disk(), 0, span as usize * 512);
        let one = usize::from(LARGE);
        let written = |place: &usize| {
            let data = blocks((place * one) as u64, one, 512, round);
            found[place * one * 512..][..one * 512] == data
        };
        *unwritten += (0..span as usize / one).filter(|place| !written(place)).count();
        lun.clear_unit_attentions();
        let new = blocks(0, span as usize, 512, 1000 + round);
        lun.write16(0, &new);
        thread::sleep(A_MOMENT);
        assert_same(&lun.read16(0, span), &new, "what was written after the function");
    };
    // What had not begun is not done any more.
    rounds(&mut (0, 0), round, |(ended, unwritten)| *ended > 100 && *unwritten > 50);
}

#[test]
fn aborting_single_tasks_under_load() {
    let (_daemon, fe) = setup_slow();
    let lun = fe.ready_lun(0, 0);
    let round = |round: u64, (queried, sum): &mut (usize, Fates)| {
        let read = |lba| lun.request(cdb::read10(lba, LARGE)).data_in(usize::from(LARGE) * 512);
        let tickets = load(&lun, 20, read);
        let named: Vec<u64> =
            tickets.iter().rev().skip(round as usize % 7).step_by(5).map(|(_, tag)| *tag).collect();
        for &tag in &named {
            let found = fe.tmf(Tmf::QueryTask, lun.address, tag);
            let allowed = [response::FUNCTION_COMPLETE, response::FUNCTION_SUCCEEDED];
            assert!(allowed.contains(&found), "QUERY TASK: {found}");
            *queried += usize::from(found == response::FUNCTION_SUCCEEDED);
            let code = fe.tmf(Tmf::AbortTask, lun.address, tag);
            assert_eq!(code, response::FUNCTION_COMPLETE, "ABORT TASK");
            let again = fe.tmf(Tmf::QueryTask, lun.address, tag);
            // Unless the device had not taken it yet, it is gone for good.
            if found == response::FUNCTION_SUCCEEDED {
                assert_eq!(again, response::FUNCTION_COMPLETE, "an aborted task is still there");
            }
        }
        let (named, others): (Vec<_>, Vec<_>) =
            tickets.into_iter().partition(|(_, tag)| named.contains(tag));
        let good = Fates { good: others.len(), ..Fates::default() };
        assert_eq!(fates(&fe, &others), good, "nobody has named them");
        let fates = fates(&fe, &named);
        assert_eq!((fates.reset, fates.attention), (0, 0), "nothing was reset: {fates:?}");
        sum.aborted += fates.aborted;
        sum.unbegun += fates.unbegun;
        assert_eq!(lun.clear_unit_attentions(), []);
    };
    let enough =
        |(queried, sum): &(usize, Fates)| *queried > 10 && sum.aborted > 10 && sum.unbegun > 5;
    rounds(&mut (0, Fates::default()), round, enough);
}

#[test]
fn ending_task_sets_under_load() {
    let (_daemon, fe) = setup_slow();
    let lun = fe.ready_lun(0, 0);
    for function in [Tmf::AbortTaskSet, Tmf::ClearTaskSet] {
        let round = |_, (found, sum): &mut (usize, Fates)| {
            let read = |lba| lun.request(cdb::read10(lba, LARGE)).data_in(usize::from(LARGE) * 512);
            let tickets = load(&lun, 20, read);
            let busy = fe.tmf(Tmf::QueryTaskSet, lun.address, 0);
            assert!([response::FUNCTION_COMPLETE, response::FUNCTION_SUCCEEDED].contains(&busy));
            assert_eq!(fe.tmf(function, lun.address, 0), response::FUNCTION_COMPLETE);
            let fates = fates(&fe, &tickets);
            assert_eq!((fates.reset, fates.attention), (0, 0), "{function:?}: {fates:?}");
            *found += usize::from(busy == response::FUNCTION_SUCCEEDED);
            sum.aborted += fates.aborted;
            sum.unbegun += fates.unbegun;
            assert_eq!(lun.clear_unit_attentions(), [], "of the nexus that did it itself");
            assert_eq!(fe.tmf(Tmf::QueryTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
        };
        let enough =
            |(found, sum): &(usize, Fates)| *found > 5 && sum.aborted > 100 && sum.unbegun > 50;
        rounds(&mut (0, Fates::default()), round, enough);
    }
}

/// Functions for one unit do not wait for, nor end, the commands of another.
#[test]
fn other_units_are_left_alone() {
    let scratch = Scratch::new();
    let daemon = Daemon::builder(&scratch)
        .disk(&scratch.image("0.img", DISK), "lun=0")
        .disk(&scratch.image("1.img", DISK), &format!("lun=1,{SLOW}"))
        .spawn();
    let fe = FrontEnd::builder().queues(QUEUES).connect(&daemon);
    let (quiet, busy) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let round = |number: u64, met: &mut usize| {
        let functions = [Tmf::LogicalUnitReset, Tmf::AbortTaskSet, Tmf::ClearTaskSet];
        let function = functions[number as usize % 3];
        let read = |lba| busy.request(cdb::read10(lba, LARGE)).data_in(usize::from(LARGE) * 512);
        let tickets = load(&busy, 20, read);
        wait_until_taken(&fe);
        assert_eq!(fe.tmf(function, quiet.address, 0), response::FUNCTION_COMPLETE);
        let in_flight = |number| {
            let queue = fe.queue(REQUESTS + number);
            queue.ring().used_idx() != queue.ring().published()
        };
        *met += usize::from((0..QUEUES).any(in_flight));
        let fates = fates(&fe, &tickets);
        assert_eq!(fates, Fates { good: tickets.len(), ..Fates::default() }, "{function:?}");
        quiet.clear_unit_attentions();
    };
    // The other unit is still busy when the function is answered.
    rounds(&mut 0, round, |met| *met > 3);
}

// ----- notifications and events ---------------------------------------------------------------

#[test]
fn asynchronous_notification_requests_are_answered() {
    let (_daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    for kind in [Notification::Query, Notification::Subscribe] {
        for events in [0, 2, 0x7e, u32::MAX] {
            let (actual, code) = fe.notification(kind, lun.address, events);
            assert_eq!((actual & !events, code), (0, response::OK), "{kind:?} {events:#x}");
        }
    }
}

fn grow(daemon: &Daemon, size: u64) {
    let file = OpenOptions::new().write(true).open(daemon.disk()).unwrap();
    file.set_len(size).unwrap();
    daemon.sighup();
}

#[test]
fn a_grown_disk_is_announced() {
    let (daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    for step in 1..=10 {
        let size = DISK + step * MIB;
        grow(&daemon, size);
        let event = fe.next_event(PATIENCE).expect("an event");
        assert_eq!((event.event, event.sense()), (event::PARAM_CHANGE, (0x2a, 0x09)));
        let named = [Address::flat(0, 0), Address::peripheral(0, 0)];
        assert!(named.contains(&event.address), "{event:?}");
        assert_eq!(lun.clear_unit_attentions(), [(0x2a, 0x09)]);
        assert_eq!(lun.capacity().0, size / 512);
        let last = (size / 512 - 1) as u32;
        let data = blocks(last.into(), 1, 512, step);
        lun.write10(last, &data);
        assert_same(&lun.read10(last, 1), &data, "the new last block");
    }
    // Nothing changed, nothing is said.
    daemon.sighup();
    assert_eq!(fe.next_event(A_MOMENT), None);
    assert_eq!(lun.clear_unit_attentions(), []);
}

/// VIRTIO 1.3, 5.6.6.3.1: events without a buffer are dropped, and the next one says so.
#[test]
fn events_without_buffers_are_counted_as_missed() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().event_buffers(0).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    grow(&daemon, DISK + MIB);
    eventually("the unit attention", || !lun.clear_unit_attentions().is_empty());
    assert_eq!(lun.capacity().0, (DISK + MIB) / 512);
    // The event may come a little later than the unit attention, but finds no buffer either.
    thread::sleep(A_MOMENT);
    fe.post_event_buffers(4);
    let event = fe.next_event(PATIENCE).expect("an event that tells of the missed one");
    assert_ne!(event.event & event::EVENTS_MISSED, 0, "{event:?}");
}

/// A driver that did not accept VIRTIO_SCSI_F_CHANGE gets no such event.
#[test]
fn no_change_events_unless_negotiated() {
    let daemon = Daemon::with_disk(DISK, "");
    let fe = FrontEnd::builder().feature(feature::SCSI_CHANGE, false).connect(&daemon);
    let lun = fe.ready_lun(0, 0);
    grow(&daemon, DISK + MIB);
    assert_eq!(fe.next_event(A_MOMENT), None);
    assert_eq!(
        lun.clear_unit_attentions(),
        [(0x2a, 0x09)],
        "the unit attention comes all the same"
    );
}
