//! A target in memory and initiators, without any transport: what tests of commands as such need.
#![allow(dead_code, clippy::cast_possible_truncation)]

use std::sync::Arc;

use thinlun::scsi::cmd::{Command, ServiceAction};
use thinlun::scsi::{
    Addressed, Cdb, Delivery, Lun, LunNumber, LunSettings, Nexus, Outcome, Plan, Port, Request,
    Status, Target, execute,
};
use thinlun::store::engine::Cancel;
use thinlun::store::mem::MemStore;
use thinlun::store::{Buffers, Store};

pub const BLOCKS: u64 = 2048;

/// A target with one disk in memory, and an initiator whose unit attention is behind it.
pub struct Bench {
    pub target: Arc<Target>,
    pub nexus: Arc<Nexus>,
    pub lun: Arc<Lun>,
}

/// What came of a command.
#[derive(Debug)]
pub struct Answer {
    pub outcome: Outcome,
    pub data: Vec<u8>,
}

impl Bench {
    pub fn new() -> Self {
        Self::over(MemStore::new(BLOCKS * 512))
    }

    pub fn fully_provisioned() -> Self {
        Self::with(MemStore::new(BLOCKS * 512), false)
    }

    pub fn over(store: MemStore) -> Self {
        Self::with(store, true)
    }

    pub fn with(store: MemStore, discard: bool) -> Self {
        let settings = LunSettings {
            target: 0,
            lun: LunNumber::new(0).unwrap(),
            serial: "SERIAL".into(),
            naa: vec![0x30, 1, 2, 3, 4, 5, 6, 7],
            block_size: 512,
            physical_block_size: 4096,
            rotational: false,
            discard,
            discard_granularity: 4096,
            detect_zeroes: Default::default(),
            write_cache: true,
        };
        let lun = Arc::new(Lun::new(settings, 0, Arc::new(store) as Arc<dyn Store>).unwrap());
        let target = Arc::new(Target::new(vec![Arc::clone(&lun)], 4));
        let nexus = target.connect(Port(1));
        let bench = Bench { target, nexus, lun };
        bench.run(&[0; 6], &[], 0).expect_sense(6, 0x2900);
        bench
    }

    /// What a command is to do, with room for this data.
    fn plan_of(&self, nexus: &Arc<Nexus>, cdb: &[u8], out: &[u8], data_in: Buffers) -> Plan {
        let data_out = Buffers::copy_of(out).unwrap();
        let request =
            Request { cdb: Cdb::new(cdb), data_out, data_in, again: false, overtaken: false };
        execute(&self.target, nexus, &Addressed::Disk(&self.lun), request)
    }

    pub fn plan(&self, cdb: &[u8], out: &[u8]) -> Plan {
        self.plan_of(&self.nexus, cdb, out, Buffers::default())
    }

    /// Runs a command to its end.
    pub fn run_as(&self, nexus: &Arc<Nexus>, cdb: &[u8], out: &[u8], room: usize) -> Answer {
        let data_in = Buffers::zeroed(room).unwrap();
        let outcome = match self.plan_of(nexus, cdb, out, data_in.clone()) {
            Plan::Done(outcome) => outcome,
            Plan::Transfer(transfer, operation) => {
                transfer.finish(&self.lun, operation.run(self.lun.store().as_ref()))
            }
            Plan::Job(work) => {
                let outcome = work.job.run(self.lun.store().as_ref(), &Cancel::default());
                if let Some(begin) = work.begin {
                    let _ = begin.send(());
                }
                outcome
            }
        };
        Answer { data: data_in.to_vec(outcome.transferred), outcome }
    }

    pub fn run(&self, cdb: &[u8], out: &[u8], room: usize) -> Answer {
        self.run_as(&self.nexus, cdb, out, room)
    }

    pub fn data(&self, cdb: &[u8], room: usize) -> Vec<u8> {
        self.run(cdb, &[], room).expect_good()
    }

    pub fn mode_sense(&self, page: u8) -> Vec<u8> {
        self.data(&[0x1a, 8, page, 0, 255, 0], 255)
    }
}

impl Answer {
    #[track_caller]
    pub fn expect_good(self) -> Vec<u8> {
        assert_eq!(
            (self.outcome.delivery, self.outcome.status),
            (Delivery::Complete, Status::Good),
            "{self:02x?}"
        );
        self.data
    }

    #[track_caller]
    pub fn expect_sense(&self, key: u8, asc: u16) {
        assert_eq!(self.outcome.status, Status::CheckCondition, "{self:02x?}");
        let sense = &self.outcome.sense;
        assert_eq!(sense[0] & 0x7f, 0x70);
        assert_eq!(
            (sense[2], u16::from_be_bytes([sense[12], sense[13]])),
            (key, asc),
            "{self:02x?}"
        );
    }

    #[track_caller]
    pub fn expect_cdb_field(&self, byte: u16, bit: u8) {
        self.expect_sense(5, 0x2400);
        let sense = &self.outcome.sense;
        assert_eq!(sense[15], 0xc8 | bit, "SKSV, C/D, BPV and the bit");
        assert_eq!(u16::from_be_bytes([sense[16], sense[17]]), byte);
    }
}

/// A CDB that names the command and is zero otherwise.
pub fn bare(command: &Command) -> Vec<u8> {
    let mut cdb = vec![0; command.usage.len()];
    cdb[0] = command.opcode();
    match command.service_action {
        ServiceAction::None => {}
        ServiceAction::Byte1(action) => cdb[1] = action,
        ServiceAction::Variable(action) => {
            cdb[7] = command.usage.len() as u8 - 8;
            cdb[8..10].copy_from_slice(&action.to_be_bytes());
        }
    }
    cdb
}
