//! A target with two disks in memory and two initiators, without any transport.

use std::sync::Arc;

use thinlun::scsi::{
    Addressed, Cdb, Delivery, Lun, LunNumber, LunSettings, Nexus, Outcome, Plan, Port, Request,
    Status, Target, execute,
};
use thinlun::store::engine::Cancel;
use thinlun::store::mem::MemStore;
use thinlun::store::{Buffers, Store};

/// Small, so that whole-disk commands are quick.
const BYTES: u64 = 256 << 10;

/// What the device must not touch.
const POISON: u8 = 0xa5;

/// The disks of the fuzzers' daemon; the options come from the input.
pub fn target(options: u8) -> Arc<Target> {
    let disks = (0..2).map(|index| {
        let store = MemStore::new(BYTES);
        let store = if options & 1 != 0 { store.read_only() } else { store };
        let settings = LunSettings {
            target: 0,
            lun: LunNumber::new(index).expect("a small number"),
            serial: format!("FUZZ{index}"),
            naa: vec![0x30, 1, 2, 3, 4, 5, 6, index as u8],
            block_size: if options & 2 != 0 { 4096 } else { 512 },
            physical_block_size: 4096,
            rotational: false,
            discard: options & 4 == 0,
            discard_granularity: 4096,
            detect_zeroes: if options & 8 != 0 {
                thinlun::scsi::DetectZeroes::Unmap
            } else {
                thinlun::scsi::DetectZeroes::Off
            },
            write_cache: options & 16 == 0,
        };
        Arc::new(
            Lun::new(settings, index.into(), Arc::new(store) as Arc<dyn Store>).expect("a disk"),
        )
    });
    Arc::new(Target::new(disks.collect(), 2))
}

pub struct Bench {
    target: Arc<Target>,
    nexuses: [Arc<Nexus>; 2],
}

impl Bench {
    pub fn new(options: u8) -> Self {
        let target = target(options);
        let nexuses = [target.connect(Port(1)), target.connect(Port(2))];
        let bench = Bench { target, nexuses };
        if options & 32 == 0 {
            // Most commands would only meet the unit attention.
            (0..4).for_each(|who| drop(bench.run(who, &[0; 6], &[], 0)));
        }
        bench
    }

    /// Runs a command; `who` chooses initiator and disk. The answer must make sense, whatever was asked.
    pub fn run(&self, who: u8, cdb: &[u8], out: &[u8], room: usize) -> Outcome {
        let lun = &self.target.disks()[usize::from(who >> 1 & 1)];
        let nexus = &self.nexuses[usize::from(who & 1)];
        let data_in = Buffers::zeroed(room).expect("memory");
        data_in.write_at(0, &vec![POISON; room]);
        let request = Request {
            cdb: Cdb::new(cdb),
            data_out: Buffers::copy_of(out).expect("memory"),
            data_in: data_in.clone(),
            again: who & 32 != 0,
            overtaken: who & 64 != 0,
        };
        let address = match who >> 2 & 3 {
            0..=2 => Addressed::Disk(lun),
            _ if who & 16 == 0 => Addressed::WellKnown(0),
            _ => Addressed::AbsentLun(0, None),
        };
        let outcome = match execute(&self.target, nexus, &address, request) {
            Plan::Done(outcome) => outcome,
            Plan::Transfer(transfer, operation) => {
                transfer.finish(lun, operation.run(lun.store().as_ref()))
            }
            Plan::Job(work) => {
                let outcome = work.job.run(lun.store().as_ref(), &Cancel::default());
                if let Some(begin) = work.begin {
                    let _ = begin.send(());
                }
                outcome
            }
        };
        check(&outcome, out.len().max(room));
        outcome
    }
}

/// What must be true of every answer.
fn check(outcome: &Outcome, room: usize) {
    assert!(outcome.transferred <= room, "{outcome:?}: more than there is room for");
    let has_sense = outcome.status == Status::CheckCondition;
    assert_eq!(has_sense, !outcome.sense.is_empty(), "{outcome:?}");
    if has_sense {
        assert_eq!(outcome.delivery, Delivery::Complete);
        assert!(matches!(outcome.sense[0] & 0x7f, 0x70 | 0x72), "{outcome:?}: no sense data");
        assert!(outcome.sense.len() <= 96);
    }
}
