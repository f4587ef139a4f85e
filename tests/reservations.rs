//! Persistent reservations, and the RESERVE and RELEASE of old, between several initiators: who may do what, who is told
//! what.
#![allow(clippy::cast_possible_truncation)]

use std::sync::Arc;

use thinlun::scsi::cmd::TABLE;
use thinlun::scsi::{Nexus, Port, Status};

mod bench;
use bench::{Answer, Bench, bare};

const CONFLICT: Status = Status::ReservationConflict;

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const IGNORE: u8 = 6;
const MOVE: u8 = 7;

const TYPES: [u8; 6] = [1, 3, 5, 6, 7, 8];

const REGISTRATIONS_PREEMPTED: u16 = 0x2a05;
const RESERVATIONS_RELEASED: u16 = 0x2a04;
const RESERVATIONS_PREEMPTED: u16 = 0x2a03;

struct Cluster {
    bench: Bench,
    /// By port; number 0 only looks.
    members: Vec<Arc<Nexus>>,
}

impl Cluster {
    fn new() -> Self {
        let bench = Bench::new();
        let members = (0..4).map(|n| bench.target.connect(Port(n))).collect();
        let cluster = Cluster { bench, members };
        (0..4).for_each(|who| drop(cluster.attentions(who)));
        cluster
    }

    fn run(&self, who: usize, cdb: &[u8], out: &[u8], room: usize) -> Answer {
        self.bench.run_as(&self.members[who], cdb, out, room)
    }

    fn out(&self, who: usize, action: u8, kind: u8, key: u64, other: u64) -> Status {
        let mut list = [key.to_be_bytes(), other.to_be_bytes()].concat();
        list.resize(24, 0);
        let answer = self.run(who, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list, 0);
        answer.outcome.status
    }

    #[track_caller]
    fn good(&self, who: usize, action: u8, kind: u8, key: u64, other: u64) {
        assert_eq!(self.out(who, action, kind, key, other), Status::Good);
    }

    fn inward(&self, action: u8) -> Vec<u8> {
        self.run(0, &[0x5e, action, 0, 0, 0, 0, 0, 4, 0, 0], &[], 1024).expect_good()
    }

    fn keys(&self) -> Vec<u64> {
        let data = self.inward(0);
        assert_eq!(u32::from_be_bytes(data[4..8].try_into().unwrap()) as usize, data.len() - 8);
        data[8..].chunks(8).map(|key| u64::from_be_bytes(key.try_into().unwrap())).collect()
    }

    fn generation(&self) -> u32 {
        u32::from_be_bytes(self.inward(0)[..4].try_into().unwrap())
    }

    /// Key of the holder, and type.
    fn reservation(&self) -> Option<(u64, u8)> {
        let data = self.inward(1);
        let key = data.get(8..16)?;
        Some((u64::from_be_bytes(key.try_into().unwrap()), data[21]))
    }

    /// What an initiator is told.
    fn attentions(&self, who: usize) -> Vec<u16> {
        let mut told = Vec::new();
        // Allowed under any reservation, and not exempt.
        while let Some(sense) = Some(self.run(who, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8))
            .filter(|answer| answer.outcome.status == Status::CheckCondition)
        {
            let sense = sense.outcome.sense;
            told.push(u16::from_be_bytes([sense[12], sense[13]]));
        }
        told
    }
}

/// SPC-5 table 71 and SBC-4 table 13, written down again: what an initiator that is not let through may do under Write
/// Exclusive types, under Exclusive Access types, and under a RESERVE.
fn allowed(name: &str, cdb: &[u8]) -> (bool, bool, bool) {
    const ALL: (bool, bool, bool) = (true, true, true);
    const PERSISTENT: (bool, bool, bool) = (true, true, false);
    const READS: (bool, bool, bool) = (true, false, false);
    const NONE: (bool, bool, bool) = (false, false, false);
    match name {
        "INQUIRY" | "REPORT LUNS" | "REQUEST SENSE" | "LOG SENSE" => ALL,
        "READ CAPACITY(10)" | "READ CAPACITY(16)" | "READ MEDIA SERIAL NUMBER" => ALL,
        "REPORT TARGET PORT GROUPS" | "REPORT TIMESTAMP" => ALL,
        "REPORT IDENTIFYING INFORMATION" | "RECEIVE COPY OPERATING PARAMETERS" => ALL,
        "PREVENT ALLOW MEDIUM REMOVAL" if cdb[4] & 3 == 0 => ALL,
        "START STOP UNIT" if cdb[4] == 1 => ALL,
        "TEST UNIT READY" => PERSISTENT,
        "MODE SENSE(6)" | "MODE SENSE(10)" | "READ BUFFER(10)" | "READ BUFFER(16)" => READS,
        "RECEIVE DIAGNOSTIC RESULTS" => READS,
        "REPORT SUPPORTED OPERATION CODES" | "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS" => READS,
        "GET LBA STATUS(16)" | "GET LBA STATUS(32)" | "POPULATE TOKEN" => READS,
        _ if name.starts_with("READ(") || name.starts_with("VERIFY(") => READS,
        _ if name.starts_with("PRE-FETCH(") || name.starts_with("READ DEFECT DATA(") => READS,
        _ => NONE,
    }
}

/// Commands that are about reservations themselves.
fn is_itself(name: &str) -> bool {
    ["PERSISTENT", "RESERVE(", "RELEASE("].iter().any(|start| name.starts_with(start))
}

#[test]
fn every_command_respects_every_reservation() {
    for command in TABLE.iter().filter(|command| !is_itself(command.name)) {
        let mut cdbs = vec![bare(command)];
        if matches!(command.name, "PREVENT ALLOW MEDIUM REMOVAL" | "START STOP UNIT") {
            let mut other = bare(command);
            other[4] = 1;
            cdbs.push(other);
        }
        for cdb in cdbs {
            let (write_exclusive, exclusive_access, basic) = allowed(command.name, &cdb);
            for kind in TYPES {
                let cluster = Cluster::new();
                cluster.good(1, REGISTER, 0, 0, 0xa);
                cluster.good(2, REGISTER, 0, 0, 0xb);
                cluster.good(1, RESERVE, kind, 0xa, 0);
                let conflicts = |who: usize| {
                    let answer = cluster.run(who, &cdb, &[0; 512], 0);
                    cluster.bench.lun.set_started(true);
                    answer.outcome.status == CONFLICT
                };
                let stranger =
                    if matches!(kind, 1 | 5 | 7) { write_exclusive } else { exclusive_access };
                let what = format!("{} {cdb:02x?} under type {kind}", command.name);
                assert_eq!(conflicts(3), !stranger, "{what}: stranger");
                assert_eq!(conflicts(2), kind < 5 && !stranger, "{what}: registrant");
                assert!(!conflicts(1), "{what}: holder");
            }
            let cluster = Cluster::new();
            cluster.run(1, &[0x16, 0, 0, 0, 0, 0], &[], 0).expect_good();
            let conflicts = |who| cluster.run(who, &cdb, &[0; 512], 0).outcome.status == CONFLICT;
            assert_eq!(conflicts(2), !basic, "{} under RESERVE", command.name);
            cluster.bench.lun.set_started(true);
            assert!(!conflicts(1), "{}: holder of a RESERVE", command.name);
        }
    }
}

#[test]
fn registering() {
    let c = Cluster::new();
    assert_eq!((c.generation(), c.keys()), (0, vec![]));
    assert_eq!(c.out(1, REGISTER, 0, 5, 6), CONFLICT, "not registered: the key must be zero");
    c.good(1, REGISTER, 0, 0, 0);
    c.good(1, REGISTER, 0, 0, 0xa);
    c.good(2, IGNORE, 0, 77, 0xb);
    assert_eq!((c.generation(), c.keys()), (3, vec![0xa, 0xb]));
    assert_eq!(c.out(1, REGISTER, 0, 0, 0xc), CONFLICT);
    c.good(1, REGISTER, 0, 0xa, 0xc);
    c.good(2, IGNORE, 0, 0, 0xd);
    assert_eq!(c.keys(), [0xc, 0xd]);
    c.good(1, REGISTER, 0, 0xc, 0);
    c.good(2, IGNORE, 0, 0, 0);
    assert_eq!(c.keys().len(), 0);
    assert_eq!(c.generation(), 7);
    for action in [RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT] {
        assert_eq!(c.out(1, action, 1, 0, 1), CONFLICT, "not registered: {action}");
    }
}

#[test]
fn lists_that_are_wrong() {
    let c = Cluster::new();
    let run = |len: u8, change: &dyn Fn(&mut [u8])| {
        let mut list = vec![0; 24];
        list[15] = 9;
        change(&mut list);
        c.run(1, &[0x5f, REGISTER, 0, 0, 0, 0, 0, 0, len, 0], &list, 0)
    };
    run(23, &|_| {}).expect_sense(5, 0x1a00);
    run(25, &|_| {}).expect_sense(5, 0x1a00);
    run(0, &|_| {}).expect_sense(5, 0x1a00);
    run(24, &|list| list[20] = 8).expect_sense(5, 0x2600);
    run(24, &|list| list[20] = 4).expect_sense(5, 0x2600);
    // There is no place to keep it in memory.
    run(24, &|list| list[20] = 1).expect_sense(5, 0x2600);
    run(24, &|_| {}).expect_good();
    let mut key = vec![0; 24];
    key[7] = 9;
    for (kind, bit) in [(0, 3), (2, 3), (9, 3), (0x11, 7)] {
        let answer = c.run(1, &[0x5f, RESERVE, kind, 0, 0, 0, 0, 0, 24, 0], &key, 0);
        answer.expect_cdb_field(2, bit);
    }
    c.good(1, RESERVE, 1, 9, 0);
    c.run(1, &[0x5f, RELEASE, 3, 0, 0, 0, 0, 0, 24, 0], &key, 0).expect_sense(5, 0x2604);
    assert_eq!(c.reservation(), Some((9, 1)));
}

#[test]
fn capabilities_and_full_status() {
    let c = Cluster::new();
    assert_eq!(c.inward(2), [0, 8, 0x10, 0x80, 0xea, 0x01, 0, 0]);
    c.good(1, REGISTER, 0, 0, 0xa);
    c.good(3, REGISTER, 0, 0, 0xc);
    c.good(3, RESERVE, 6, 0xc, 0);
    let full = c.inward(3);
    assert_eq!(full.len(), 8 + 2 * 48);
    let (first, second) = (&full[8..56], &full[56..]);
    assert_eq!((first[7], first[12], first[19], first[23], first[24]), (0xa, 0, 1, 24, 0x0f));
    assert_eq!((second[7], second[12], second[13], second[19]), (0xc, 1, 6, 3));
    assert_ne!(first[24..], second[24..], "each initiator has a name of its own");
}

#[test]
fn reserving_and_releasing() {
    for kind in TYPES {
        let c = Cluster::new();
        (1..4).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
        let generation = c.generation();
        c.good(1, RESERVE, kind, 1, 0);
        c.good(1, RESERVE, kind, 1, 0);
        let of_all = kind >= 7;
        assert_eq!(c.reservation(), Some((if of_all { 0 } else { 1 }, kind)));
        let again = c.out(2, RESERVE, kind, 2, 0);
        assert_eq!(again, if of_all { Status::Good } else { CONFLICT });
        let another = if kind == 1 { 3 } else { 1 };
        assert_eq!(c.out(2, RESERVE, another, 2, 0), CONFLICT);
        c.good(2, RELEASE, if of_all { kind } else { 1 }, 2, 0);
        assert_eq!(c.reservation().is_none(), of_all, "only a holder releases");
        if !of_all {
            c.good(1, RELEASE, kind, 1, 0);
        }
        let (releaser, told) = if of_all { (2, 1) } else { (1, 2) };
        assert_eq!(c.reservation(), None);
        let expected = if kind >= 5 { vec![RESERVATIONS_RELEASED] } else { vec![] };
        assert_eq!(c.attentions(told), expected);
        assert_eq!(c.attentions(3), expected);
        assert!(c.attentions(releaser).is_empty());
        assert_eq!(c.generation(), generation, "only registrations are counted");
    }
}

#[test]
fn who_leaves_takes_his_reservation_with_him() {
    for kind in TYPES {
        let c = Cluster::new();
        (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
        c.good(1, RESERVE, kind, 1, 0);
        c.good(1, REGISTER, 0, 1, 0);
        assert_eq!(c.reservation().is_some(), kind >= 7, "type {kind}");
        if kind >= 7 {
            // That it has made the reservation is nothing any more.
            let write = c.run(1, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512], 0);
            assert_eq!(write.outcome.status, CONFLICT, "type {kind}");
        }
        let told = if matches!(kind, 5 | 6) { vec![RESERVATIONS_RELEASED] } else { vec![] };
        assert_eq!(c.attentions(2), told);
        c.good(2, REGISTER, 0, 2, 0);
        assert_eq!(c.reservation(), None);
    }
}

#[test]
fn clearing() {
    let c = Cluster::new();
    (1..4).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
    c.good(2, RESERVE, 3, 2, 0);
    assert_eq!(c.out(1, CLEAR, 0, 2, 0), CONFLICT);
    c.good(1, CLEAR, 0, 1, 0);
    assert_eq!((c.reservation(), c.keys()), (None, vec![]));
    assert!(c.attentions(1).is_empty());
    for who in [2, 3] {
        assert_eq!(c.attentions(who), [RESERVATIONS_PREEMPTED]);
    }
}

#[test]
fn preempting() {
    for action in [PREEMPT, PREEMPT_AND_ABORT] {
        for kind in TYPES {
            // The holder: its reservation is taken over, with another type.
            let c = Cluster::new();
            (1..4).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
            c.good(1, RESERVE, kind, 1, 0);
            if kind < 7 {
                c.good(2, action, 5, 2, 1);
                assert_eq!((c.reservation(), c.keys()), (Some((2, 5)), vec![2, 3]));
                assert_eq!(c.attentions(1), [REGISTRATIONS_PREEMPTED]);
                let told = if kind == 5 { vec![] } else { vec![RESERVATIONS_RELEASED] };
                assert_eq!(c.attentions(3), told);
                assert_eq!(c.out(3, action, 1, 3, 0), Status::CheckCondition);
            } else {
                // One who is not alone in holding it: only the registration goes.
                c.good(2, action, 1, 2, 3);
                assert_eq!((c.reservation(), c.keys()), (Some((0, kind)), vec![1, 2]));
                assert_eq!(c.attentions(3), [REGISTRATIONS_PREEMPTED]);
                // All of them.
                c.good(2, action, 1, 2, 0);
                assert_eq!((c.reservation(), c.keys()), (Some((2, 1)), vec![2]));
                assert_eq!(c.attentions(1), [REGISTRATIONS_PREEMPTED]);
            }
            assert_eq!(c.out(2, action, 1, 2, 99), CONFLICT, "nobody has that key");
        }
        // Without a reservation it takes registrations away, all that have the key.
        let c = Cluster::new();
        c.good(1, REGISTER, 0, 0, 1);
        (2..4).for_each(|who| c.good(who, REGISTER, 0, 0, 7));
        let generation = c.generation();
        c.good(1, action, 1, 1, 7);
        assert_eq!((c.reservation(), c.keys()), (None, vec![1]));
        assert_eq!(c.generation(), generation + 1);
        for who in [2, 3] {
            assert_eq!(c.attentions(who), [REGISTRATIONS_PREEMPTED]);
        }
    }
}

#[test]
fn one_who_preempts_himself_only_changes_the_type() {
    let c = Cluster::new();
    (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
    c.good(1, RESERVE, 6, 1, 0);
    c.good(1, PREEMPT, 1, 1, 1);
    assert_eq!((c.reservation(), c.keys()), (Some((1, 1)), vec![1, 2]));
    assert_eq!(c.attentions(2), [RESERVATIONS_RELEASED]);
}

/// All registrations with the key go, that of who asks as well, unless it takes the reservation over.
#[test]
fn one_who_names_his_own_key_goes_with_the_others() {
    for action in [PREEMPT, PREEMPT_AND_ABORT] {
        // Nothing is reserved, or by somebody with another key.
        for kind in [None, Some(5), Some(3)] {
            let c = Cluster::new();
            (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, 7));
            c.good(3, REGISTER, 0, 0, 3);
            if let Some(kind) = kind {
                c.good(3, RESERVE, kind, 3, 0);
            }
            let generation = c.generation();
            c.good(1, action, 1, 7, 7);
            assert_eq!((c.keys(), c.generation()), (vec![3], generation + 1));
            assert_eq!(c.reservation(), kind.map(|kind| (3, kind)));
            assert_eq!(c.attentions(2), [REGISTRATIONS_PREEMPTED]);
            assert!(c.attentions(1).is_empty() && c.attentions(3).is_empty());
            assert_eq!(c.out(1, action, 1, 7, 3), CONFLICT, "it is not registered any more");
        }
        // Alone with its key, and alone at all.
        let c = Cluster::new();
        (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
        c.good(1, action, 1, 1, 1);
        assert_eq!(c.keys(), [2]);
        c.good(2, action, 1, 2, 2);
        assert!(c.keys().is_empty());
        // One of those who all hold the reservation; with the last of them it ends.
        for kind in [7, 8] {
            let c = Cluster::new();
            (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
            c.good(1, RESERVE, kind, 1, 0);
            c.good(1, action, 1, 1, 1);
            assert_eq!((c.keys(), c.reservation()), (vec![2], Some((0, kind))));
            c.good(2, action, 1, 2, 2);
            assert_eq!((c.keys(), c.reservation()), (vec![], None));
        }
        // The holder's key: who has it too and takes over stays.
        let c = Cluster::new();
        (1..4).for_each(|who| c.good(who, REGISTER, 0, 0, 7));
        c.good(2, RESERVE, 6, 7, 0);
        c.good(1, action, 1, 7, 7);
        assert_eq!((c.keys(), c.reservation()), (vec![7], Some((7, 1))));
        for preempted in [2, 3] {
            assert_eq!(c.attentions(preempted), [REGISTRATIONS_PREEMPTED]);
            assert_eq!(c.out(preempted, RESERVE, 1, 7, 0), CONFLICT);
        }
    }
}

/// REGISTER and REGISTER AND IGNORE EXISTING KEY, from no key to no key.
#[test]
fn who_is_not_registered_and_stays_so_changes_nothing() {
    let c = Cluster::new();
    c.good(1, REGISTER, 0, 0, 1);
    c.good(1, RESERVE, 1, 1, 0);
    let before = (c.keys(), c.reservation());
    for action in [REGISTER, IGNORE] {
        c.good(2, action, 0, 0, 0);
        assert_eq!((c.keys(), c.reservation()), before);
    }
    c.good(2, IGNORE, 0, 9, 0);
    assert_eq!(c.out(2, REGISTER, 0, 9, 0), CONFLICT);
    assert_eq!((c.keys(), c.reservation()), before);
    assert!((1..4).all(|who| c.attentions(who).is_empty()));
}

#[test]
fn moving_a_reservation() {
    let c = Cluster::new();
    (1..3).for_each(|who| c.good(who, REGISTER, 0, 0, who as u64));
    let transport_id = |port: u8| {
        let mut id = vec![0x0f, 0, 0, 0];
        id.extend(b"THINLUN ");
        id.resize(23, 0);
        id.push(port);
        id
    };
    let run = |who: usize, key: u8, other: u8, flags: u8, port: u8, id: &[u8]| {
        let mut list = vec![0; 24];
        (list[7], list[15], list[17], list[19], list[23]) =
            (key, other, flags, port, id.len() as u8);
        list.extend(id);
        c.run(who, &[0x5f, MOVE, 5, 0, 0, 0, 0, 0, list.len() as u8, 0], &list, 0)
    };
    let conflict = |answer: Answer| assert_eq!(answer.outcome.status, CONFLICT);
    conflict(run(1, 1, 9, 0, 3, &transport_id(3)));
    c.good(1, RESERVE, 5, 1, 0);
    conflict(run(2, 2, 9, 0, 3, &transport_id(3)));
    conflict(run(1, 8, 9, 0, 3, &transport_id(3)));
    run(1, 1, 0, 0, 3, &transport_id(3)).expect_sense(5, 0x2600);
    run(1, 1, 9, 0, 1, &transport_id(1)).expect_sense(5, 0x2600);
    run(1, 1, 9, 0, 9, &transport_id(9)).expect_sense(5, 0x2600);
    run(1, 1, 9, 0, 3, &transport_id(2)).expect_sense(5, 0x2600);
    run(1, 1, 9, 0, 3, &transport_id(3)[..20]).expect_sense(5, 0x1a00);
    run(1, 1, 9, 0, 3, &transport_id(3)).expect_good();
    assert_eq!((c.reservation(), c.keys()), (Some((9, 5)), vec![1, 2, 9]));
    run(3, 9, 4, 2, 1, &transport_id(1)).expect_good();
    assert_eq!((c.reservation(), c.keys()), (Some((4, 5)), vec![4, 2]));
    // What all who are registered hold is nobody's to give.
    c.good(1, RELEASE, 5, 4, 0);
    for kind in [7, 8] {
        c.good(1, RESERVE, kind, 4, 0);
        conflict(run(1, 4, 9, 0, 3, &transport_id(3)));
        assert_eq!((c.reservation(), c.keys()), (Some((0, kind)), vec![4, 2]));
        c.good(1, RELEASE, kind, 4, 0);
    }
}

#[test]
fn reserve_and_release() {
    let c = Cluster::new();
    for (reserve, release) in
        [(vec![0x16, 0, 0, 0, 0, 0], vec![0x17, 0, 0, 0, 0, 0]), (vec![0x56; 1], vec![0x57; 1])]
    {
        let long = |mut cdb: Vec<u8>| {
            cdb.resize(if cdb[0] < 0x20 { 6 } else { 10 }, 0);
            cdb
        };
        let (reserve, release) = (long(reserve), long(release));
        let status = |who, cdb: &[u8]| c.run(who, cdb, &[], 0).outcome.status;
        assert_eq!(status(1, &reserve), Status::Good);
        assert_eq!(status(1, &reserve), Status::Good);
        assert_eq!(status(2, &reserve), CONFLICT);
        assert_eq!(status(2, &release), Status::Good, "and changes nothing");
        assert_eq!(status(2, &[0; 6]), CONFLICT);
        assert_eq!(c.out(1, REGISTER, 0, 0, 5), CONFLICT, "the two kinds do not mix");
        assert_eq!(status(2, &[0x5e, 0, 0, 0, 0, 0, 0, 0, 0, 0]), CONFLICT);
        assert_eq!(status(1, &release), Status::Good);
        assert_eq!(status(2, &[0; 6]), Status::Good);
        // A reset, or the loss of its nexus, ends it.
        assert_eq!(status(1, &reserve), Status::Good);
        c.bench.target.reset(&c.bench.lun);
        (1..4).for_each(|who| assert_eq!(c.attentions(who), [0x2900]));
        assert_eq!(status(2, &reserve), Status::Good);
        c.bench.target.power_on(&c.members[2]);
        assert_eq!(c.attentions(2), [0x2900]);
        assert_eq!(status(1, &[0; 6]), Status::Good);
        assert_eq!(status(2, &reserve), Status::Good);
        c.bench.target.reset_nexus(&c.members[2], &c.bench.lun);
        assert_eq!(c.attentions(2), [0x2907]);
        assert_eq!(status(1, &[0; 6]), Status::Good);
    }
    // CRH: where there are registrations it is GOOD for who is let through, and does nothing.
    c.good(1, REGISTER, 0, 0, 1);
    let reserve = |who| c.run(who, &[0x16, 0, 0, 0, 0, 0], &[], 0).outcome.status;
    assert_eq!((reserve(1), reserve(2)), (Status::Good, CONFLICT));
    assert_eq!(c.run(2, &[0; 6], &[], 0).outcome.status, Status::Good);
}

#[test]
fn a_reset_leaves_registrations_alone() {
    let c = Cluster::new();
    c.good(1, REGISTER, 0, 0, 1);
    c.good(1, RESERVE, 1, 1, 0);
    c.bench.target.reset(&c.bench.lun);
    (0..4).for_each(|who| assert_eq!(c.attentions(who), [0x2900]));
    assert_eq!((c.reservation(), c.keys()), (Some((1, 1)), vec![1]));
}
