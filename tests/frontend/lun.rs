//! A logical unit with the commands that tests want in one line.
//!
//! Methods named after commands demand GOOD status and return what the command transferred; to
//! look at a failure, use [`Lun::run`] and the CDB builders.

use super::cdb::{self, Cdb};
use super::connection::{FIRST_REQUEST_QUEUE, FrontEnd};
use super::queue::{Shape, Ticket};
use super::scsi::{Address, ScsiRequest, ScsiResponse, key};

/// More than one command can have pending.
const MAX_UNIT_ATTENTIONS: usize = 8;

#[derive(Clone)]
pub struct Lun<'a> {
    fe: &'a FrontEnd,
    pub address: Address,
    pub queue: usize,
    pub block_size: usize,
    pub blocks: u64,
    pub shape: Shape,
}

impl<'a> Lun<'a> {
    pub fn new(fe: &'a FrontEnd, address: Address) -> Self {
        let shape = Shape::default();
        Self { fe, address, queue: FIRST_REQUEST_QUEUE, block_size: 512, blocks: 0, shape }
    }

    /// The same unit, through another queue.
    pub fn on_queue(&self, queue: usize) -> Self {
        Self { queue, ..self.clone() }
    }

    /// The same unit, with other descriptors.
    pub fn with_shape(&self, shape: Shape) -> Self {
        Self { shape, ..self.clone() }
    }

    pub fn front_end(&self) -> &'a FrontEnd {
        self.fe
    }

    /// Takes all unit attentions and reads the capacity.
    #[track_caller]
    pub fn make_ready(&mut self) {
        self.clear_unit_attentions();
        (self.blocks, self.block_size) = self.capacity();
    }

    /// Returns the unit attentions that were pending, in order, as (asc, ascq).
    #[track_caller]
    pub fn clear_unit_attentions(&self) -> Vec<(u8, u8)> {
        let mut found = Vec::new();
        for _ in 0..MAX_UNIT_ATTENTIONS {
            let response = self.run(cdb::test_unit_ready());
            match response.sense_code() {
                Some((key::UNIT_ATTENTION, asc, ascq)) => found.push((asc, ascq)),
                _ => {
                    response.expect_good();
                    return found;
                }
            }
        }
        panic!("unit attentions do not end: {found:02x?}")
    }

    // ----- any command ----------------------------------------------------------------------

    /// A request with a new tag and this unit's shape.
    pub fn request(&self, cdb: Cdb) -> ScsiRequest {
        let tag = self.fe.new_tag();
        ScsiRequest::new(self.address, cdb).tag(tag).shape(self.shape.clone())
    }

    #[track_caller]
    pub fn submit(&self, request: &ScsiRequest) -> Ticket {
        self.fe.submit(self.queue, request)
    }

    #[track_caller]
    pub fn execute(&self, request: &ScsiRequest) -> ScsiResponse {
        self.fe.run_on(self.queue, request)
    }

    /// A command without data.
    #[track_caller]
    pub fn run(&self, cdb: Cdb) -> ScsiResponse {
        self.execute(&self.request(cdb))
    }

    #[track_caller]
    pub fn run_in(&self, cdb: Cdb, len: usize) -> ScsiResponse {
        self.execute(&self.request(cdb).data_in(len))
    }

    #[track_caller]
    pub fn run_out(&self, cdb: Cdb, data: &[u8]) -> ScsiResponse {
        self.execute(&self.request(cdb).data_out(data))
    }

    /// A read of whole blocks; the response may be anything.
    #[track_caller]
    pub fn run_read(&self, cdb: Cdb, blocks: usize) -> ScsiResponse {
        self.run_in(cdb, blocks * self.block_size)
    }

    // ----- commands that succeed ------------------------------------------------------------

    #[track_caller]
    pub fn test_unit_ready(&self) {
        self.run(cdb::test_unit_ready()).expect_good();
    }

    #[track_caller]
    pub fn inquiry(&self) -> Vec<u8> {
        self.run_in(cdb::inquiry(255), 255).expect_good().data().to_vec()
    }

    #[track_caller]
    pub fn vpd(&self, page: u8) -> Vec<u8> {
        let data = self.run_in(cdb::inquiry_vpd(page, 1024), 1024).expect_good().data().to_vec();
        assert_eq!(data[1], page, "the page code");
        data
    }

    /// The logical block addresses there are, and their size.
    #[track_caller]
    pub fn capacity(&self) -> (u64, usize) {
        let data = self.read_capacity16();
        let last = u64::from_be_bytes(data[0..8].try_into().unwrap());
        let size = u32::from_be_bytes(data[8..12].try_into().unwrap());
        (last + 1, size as usize)
    }

    #[track_caller]
    pub fn read_capacity16(&self) -> Vec<u8> {
        self.run_in(cdb::read_capacity16(32), 32).expect_good().data().to_vec()
    }

    /// Last address and block size; FFFFFFFFh means: ask READ CAPACITY (16).
    #[track_caller]
    pub fn read_capacity10(&self) -> (u32, u32) {
        let data = self.run_in(cdb::read_capacity10(), 8).expect_good().data().to_vec();
        let word = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// The eight-byte entries of REPORT LUNS.
    #[track_caller]
    pub fn report_luns(&self, select: u8) -> Vec<[u8; 8]> {
        let response = self.run_in(cdb::report_luns(select, 4096), 4096).expect_good();
        let data = response.data();
        let len = u32::from_be_bytes(data[0..4].try_into().unwrap()) as usize;
        assert_eq!(data.len(), 8 + len, "the list length");
        data[8..].chunks(8).map(|entry| entry.try_into().unwrap()).collect()
    }

    #[track_caller]
    pub fn mode_sense10(&self, page: u8) -> Vec<u8> {
        self.run_in(cdb::mode_sense10(page, 0, 512), 512).expect_good().data().to_vec()
    }

    #[track_caller]
    pub fn read10(&self, lba: u32, blocks: u16) -> Vec<u8> {
        self.transfer_in(cdb::read10(lba, blocks), blocks.into())
    }

    #[track_caller]
    pub fn read16(&self, lba: u64, blocks: u32) -> Vec<u8> {
        self.transfer_in(cdb::read16(lba, blocks), blocks as usize)
    }

    #[track_caller]
    pub fn write10(&self, lba: u32, data: &[u8]) {
        let blocks = u16::try_from(self.block_count(data)).expect("16 bits of blocks");
        self.transfer_out(cdb::write10(lba, blocks), data);
    }

    #[track_caller]
    pub fn write16(&self, lba: u64, data: &[u8]) {
        self.transfer_out(cdb::write16(lba, self.block_count(data)), data);
    }

    #[track_caller]
    pub fn synchronize_cache(&self) {
        self.run(cdb::synchronize_cache10(0, 0)).expect_good();
    }

    /// A command that fills the whole buffer.
    #[track_caller]
    pub fn transfer_in(&self, cdb: Cdb, blocks: usize) -> Vec<u8> {
        let response = self.run_read(cdb, blocks).expect_good();
        assert_eq!(response.residual, 0, "{cdb:?}: {response:?}");
        assert_eq!(response.used_len as usize, 108 + response.buffer.len(), "{response:?}");
        response.buffer
    }

    /// A command that takes the whole buffer.
    #[track_caller]
    pub fn transfer_out(&self, cdb: Cdb, data: &[u8]) {
        let response = self.run_out(cdb, data).expect_good();
        assert_eq!(response.residual, 0, "{cdb:?}: {response:?}");
        assert_eq!(response.used_len, 108, "{response:?}");
    }

    #[track_caller]
    fn block_count(&self, data: &[u8]) -> u32 {
        assert_eq!(data.len() % self.block_size, 0, "whole blocks");
        (data.len() / self.block_size) as u32
    }
}
