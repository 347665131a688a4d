//! INQUIRY data and vital product data (SPC-5 §6.6, §7.7; SBC-4 §6.6).

use super::unit::{
    BLOCKS_PER_PHYSICAL, MAX_TRANSFER_BLOCKS, MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BLOCKS,
};
use crate::block::{DeviceInfo, SECTOR};

/// T10 vendor identification.
pub const VENDOR: &[u8; 8] = b"md99    ";
/// Product identification.
pub const PRODUCT: &[u8; 16] = b"volume          ";
/// Product revision level.
pub const REVISION: &[u8; 4] = b"0001";

/// Qualifier 011b with type 1Fh: no logical unit can be there.
const NOTHING_HERE: u8 = 0x7f;

/// Standard INQUIRY data; `present` says whether the LUN is 0.
pub fn standard(present: bool) -> Vec<u8> {
    let mut data = vec![0; 96];
    data[0] = if present { 0x00 } else { NOTHING_HERE };
    data[2] = 0x06; // SPC-4
    data[3] = 0x12; // HISUP, response data format 2
    data[4] = (data.len() - 5) as u8;
    data[7] = 0x02; // CMDQUE
    data[8..16].copy_from_slice(VENDOR);
    data[16..32].copy_from_slice(PRODUCT);
    data[32..36].copy_from_slice(REVISION);
    // Version descriptors: SAM-5, iSCSI, SPC-4, SBC-3.
    for (at, version) in [0x00a0_u16, 0x0960, 0x0460, 0x04c0].into_iter().enumerate() {
        data[58 + 2 * at..60 + 2 * at].copy_from_slice(&version.to_be_bytes());
    }
    data
}

/// A vital product data page; `None` if there is no such page. `iqn` is the target's name.
pub fn vpd(page: u8, present: bool, info: &DeviceInfo, iqn: &str) -> Option<Vec<u8>> {
    let body = match page {
        0x00 if present => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
        0x00 => vec![0x00],
        _ if !present => return None,
        0x80 => info.id.simple().to_string().into_bytes(),
        0x83 => identification(info, iqn),
        0xb0 => block_limits(info),
        0xb1 => {
            let mut body = vec![0; 60];
            body[0..2].copy_from_slice(&1_u16.to_be_bytes()); // MEDIUM ROTATION RATE: does not rotate
            body
        }
        // LBPU, LBPWS, LBPWS10, LBPRZ 001b; thin provisioned; no threshold, no descriptor.
        0xb2 => vec![0, 0xe4, 0x02, 0],
        _ => return None,
    };
    let mut data = vec![if present { 0 } else { NOTHING_HERE }, page];
    data.extend((body.len() as u16).to_be_bytes());
    data.extend(body);
    Some(data)
}

/// Device identification: how multipath knows the volume again by whatever path.
fn identification(info: &DeviceInfo, iqn: &str) -> Vec<u8> {
    fn designator(protocol_and_set: u8, kind: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![protocol_and_set, kind, 0, value.len() as u8];
        bytes.extend(value);
        bytes
    }
    let id = info.id.as_u128();
    // NAA 3h, locally assigned: we own no IEEE company id. 60 bits of the volume's random UUID.
    let naa = 3 << 60 | (id as u64 ^ (id >> 64) as u64) & ((1 << 60) - 1);
    let mut vendor = VENDOR.to_vec();
    vendor.extend(info.id.simple().to_string().bytes());
    // SCSI name string: UTF-8, NUL-terminated, padded to four bytes.
    let name = |name: String| {
        let mut name = name.into_bytes();
        name.push(0);
        name.resize(name.len().next_multiple_of(4), 0);
        name
    };
    let mut all = designator(0x01, 0x03, &naa.to_be_bytes()); // binary, logical unit, NAA
    all.extend(designator(0x02, 0x01, &vendor)); // ASCII, logical unit, T10 vendor id
    all.extend(designator(0x51, 0x94, &[0, 0, 0, 1])); // iSCSI target port: relative port 1
    all.extend(designator(0x51, 0x95, &[0, 0, 0, 1])); // target port group 1
    all.extend(designator(0x53, 0x98, &name(format!("{iqn},t,0x0001")))); // target port name
    all.extend(designator(0x53, 0xa8, &name(iqn.to_owned()))); // target device name
    all
}

fn block_limits(info: &DeviceInfo) -> Vec<u8> {
    let mut body = vec![0; 60];
    body[0] = 0x01; // WSNZ: WRITE SAME of "the rest" is refused
    let chunk = info.chunk / SECTOR as u32;
    let mut put = |at: usize, value: u32| body[at - 4..at].copy_from_slice(&value.to_be_bytes());
    // Offsets in the page are those of SBC-4 table 270, less the 4 bytes before the body, plus 4 for the slice's end.
    put(8, MAX_TRANSFER_BLOCKS);
    put(12, chunk.min(MAX_TRANSFER_BLOCKS));
    put(20, MAX_UNMAP_BLOCKS);
    put(24, MAX_UNMAP_DESCRIPTORS);
    put(28, BLOCKS_PER_PHYSICAL);
    put(32, 0x8000_0000); // UGAVALID, alignment 0
    body[2..4].copy_from_slice(&(BLOCKS_PER_PHYSICAL as u16).to_be_bytes()); // optimal transfer length granularity
    body[32..40].copy_from_slice(&u64::from(MAX_WRITE_SAME_BLOCKS).to_be_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DeviceInfo {
        DeviceInfo {
            id: uuid::Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdee),
            name: "tank".into(),
            bytes: 1 << 30,
            chunk: 256 * 1024,
            write_cache: true,
        }
    }

    #[test]
    fn block_limits_stand_where_sbc_says() {
        let page = vpd(0xb0, true, &info(), "iqn.x").unwrap();
        let u32_at = |at: usize| u32::from_be_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!(page.len(), 64);
        assert_eq!((page[1], page[3], page[4]), (0xb0, 60, 1));
        assert_eq!(u16::from_be_bytes([page[6], page[7]]), 8);
        assert_eq!(u32_at(8), MAX_TRANSFER_BLOCKS);
        assert_eq!(u32_at(12), 512);
        assert_eq!(u32_at(20), MAX_UNMAP_BLOCKS);
        assert_eq!(u32_at(24), MAX_UNMAP_DESCRIPTORS);
        assert_eq!(u32_at(28), 8);
        assert_eq!(u32_at(32), 0x8000_0000);
        assert_eq!(u64::from_be_bytes(page[36..44].try_into().unwrap()), u64::from(MAX_WRITE_SAME_BLOCKS));
    }

    #[test]
    fn identification_is_the_volumes_own() {
        let page = vpd(0x83, true, &info(), "iqn.x").unwrap();
        assert_eq!(&page[4..16], [1, 3, 0, 8, 0x30, 0, 0, 0, 0, 0, 0, 1]);
        let mut other = info();
        other.id = uuid::Uuid::from_u128(7);
        assert_ne!(page, vpd(0x83, true, &other, "iqn.x").unwrap());
    }

    #[test]
    fn a_lun_that_does_not_exist_says_so() {
        assert_eq!(standard(false)[0], 0x7f);
        assert_eq!(standard(true)[..5], [0, 0, 6, 0x12, 91]);
        assert_eq!(vpd(0x83, false, &info(), "iqn.x"), None);
        assert_eq!(vpd(0x00, false, &info(), "iqn.x"), Some(vec![0x7f, 0, 0, 1, 0]));
    }
}
