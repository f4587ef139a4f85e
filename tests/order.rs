//! Task attributes: what ORDERED and HEAD OF QUEUE commands wait for, and who waits for them (SAM-6 8.6).

mod frontend;

use frontend::scsi::response;
use frontend::*;

const DISK: u64 = 256 * MIB;

fn setup() -> (Daemon, FrontEnd) {
    let scratch = Scratch::new();
    let disk = scratch.image("disk.img", DISK);
    let other = scratch.image("other.img", MIB);
    let daemon = Daemon::builder(&scratch).disk(&disk, "").disk(&other, "").spawn();
    let fe = FrontEnd::builder().queues(2).connect(&daemon);
    fe.ready_lun(0, 1);
    (daemon, fe)
}

/// A command that takes a while: a pattern all over the disk.
fn slow(lun: &Lun<'_>) -> ScsiRequest {
    let pattern = vec![0xa5; lun.block_size];
    lun.request(cdb::write_same16(0, 0, (DISK / 512) as u32)).data_out(pattern)
}

fn ready(lun: &Lun<'_>, attribute: TaskAttribute) -> ScsiRequest {
    lun.request(cdb::test_unit_ready()).attribute(attribute)
}

#[test]
fn commands_end_in_the_order_that_their_attributes_ask_for() {
    use TaskAttribute::{HeadOfQueue, Ordered, Simple};
    let (_daemon, fe) = setup();
    let (lun, other) = (fe.ready_lun(0, 0), fe.ready_lun(0, 1));
    let requests = [
        slow(&lun),
        ready(&lun, Ordered),
        ready(&lun, Simple),
        ready(&lun, Ordered),
        ready(&lun, Simple),
        ready(&lun, HeadOfQueue),
        // Another disk's task set is another.
        ready(&other, Simple),
        ready(&other, Ordered),
    ];
    let tickets: Vec<Ticket> = requests.iter().map(|r| fe.submit(2, r)).collect();
    let order: Vec<u64> = tickets
        .into_iter()
        .map(|ticket| {
            let done = fe.queue(2).wait(ticket);
            ScsiResponse::parse(&done).expect_good();
            done.order
        })
        .collect();
    let [long, first, behind, second, last, head, other_simple, other_ordered] = order[..] else {
        panic!("{order:?}")
    };
    assert!(long < first && first < behind && behind < second && second < last, "{order:?}");
    assert!(head < long && other_simple < other_ordered && other_ordered < long, "{order:?}");
}

/// Many writes to one block, all in flight at once: with ORDERED the last one wins, and each read sees the write
/// before it.
#[test]
fn ordered_writes_and_reads_of_one_block() {
    let scratch = Scratch::new();
    for options in ["", "cache=direct", "cache=writethrough"] {
        let disk = scratch.image("disk.img", MIB);
        let daemon = Daemon::builder(&scratch).disk(&disk, options).spawn();
        let fe = FrontEnd::connect(&daemon);
        let lun = fe.ready_lun(0, 0);
        for round in 0..20u8 {
            let requests: Vec<ScsiRequest> = (0..24u8)
                .map(|n| {
                    let request = match n % 2 {
                        0 => {
                            lun.request(cdb::write10(8, 8)).data_out(vec![round * 10 + n / 2; 4096])
                        }
                        _ => lun.request(cdb::read10(8, 8)).data_in(4096),
                    };
                    request.attribute(TaskAttribute::Ordered)
                })
                .collect();
            for (n, answer) in fe.run_all(2, &requests).into_iter().enumerate() {
                let answer = answer.expect_good();
                if n % 2 == 1 {
                    let expected = vec![round * 10 + n as u8 / 2; 4096];
                    assert!(answer.data() == expected, "{options}, round {round}, read {n}");
                }
            }
        }
    }
}

/// What waits can be ended before it has begun.
#[test]
fn waiting_commands_are_ended_by_task_management() {
    let (daemon, fe) = setup();
    let lun = fe.ready_lun(0, 0);
    let write = |lba: u32, byte: u8| {
        let write = lun.request(cdb::write10(lba, 1)).data_out(vec![byte; 512]);
        write.attribute(TaskAttribute::Ordered).tag(u64::from(lba))
    };
    let tickets = [slow(&lun), write(70_000, 1), write(70_001, 2), write(70_002, 3)]
        .map(|request| lun.submit(&request));
    assert_eq!(fe.tmf(Tmf::QueryTask, lun.address, 70_001), response::FUNCTION_SUCCEEDED);
    assert_eq!(fe.tmf(Tmf::AbortTask, lun.address, 70_001), response::FUNCTION_COMPLETE);
    let [long, first, aborted, last] = tickets;
    fe.wait(aborted).expect_response(response::ABORTED);
    fe.wait(long).expect_good();
    fe.wait(first).expect_good();
    fe.wait(last).expect_good();
    let found: Vec<u8> = (70_000..70_003).map(|lba| lun.read10(lba, 1)[0]).collect();
    assert_eq!(found, [1, 0xa5, 3]);

    let tickets = [slow(&lun), write(70_000, 7), write(70_001, 8)].map(|r| lun.submit(&r));
    assert_eq!(fe.tmf(Tmf::AbortTaskSet, lun.address, 0), response::FUNCTION_COMPLETE);
    for ticket in tickets {
        fe.wait(ticket).expect_response(response::ABORTED);
    }
    lun.test_unit_ready();
    assert!(lun.read10(70_000, 1)[0] != 7, "an aborted command was done");

    // A driver that goes away with commands waiting holds nobody up.
    let left = [slow(&lun), write(70_000, 9), write(70_001, 9)].map(|r| lun.submit(&r));
    drop((left, lun));
    drop(fe);
    let fe = FrontEnd::connect(&daemon);
    assert!(
        fe.ready_lun(0, 0).read10(70_000, 1)[0] != 9,
        "a command of a driver that is gone was done"
    );
}
