//! Mode pages (SPC-5 §7.5, SBC-4 §6.5): read-write error recovery 01h, caching 08h, control 0Ah, informational
//! exceptions control 1Ch. Nothing in them can be changed.

use super::sense::Sense;
use crate::block::{DeviceInfo, SECTOR};

/// DPOFUA: DPO and FUA are understood.
const DEVICE_SPECIFIC: u8 = 0x10;

fn pages(info: &DeviceInfo, page: u8, changeable: bool) -> Option<Vec<u8>> {
    let mut recovery = vec![0x01, 0x0a, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0]; // AWRE, ARRE
    let mut caching = vec![0; 20];
    caching[..3].copy_from_slice(&[0x08, 0x12, if info.write_cache { 0x04 } else { 0 }]);
    let mut control = vec![0x0a, 0x0a, 0x02, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0]; // GLTSD, unrestricted reordering
    let mut exceptions = vec![0x1c, 0x0a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0]; // DEXCPT
    if changeable {
        for page in [&mut recovery, &mut caching, &mut control, &mut exceptions] {
            page[2..].fill(0);
        }
    }
    match page {
        0x01 => Some(recovery),
        0x08 => Some(caching),
        0x0a => Some(control),
        0x1c => Some(exceptions),
        0x3f => Some([recovery, caching, control, exceptions].concat()),
        _ => None,
    }
}

/// MODE SENSE data, whole; the caller cuts it to the allocation length.
///
/// # Errors
/// No such page or subpage, or saved values, which there are none of.
pub fn sense(
    info: &DeviceInfo,
    long: bool,
    no_descriptor: bool,
    long_lba: bool,
    control: u8,
    page: u8,
    subpage: u8,
) -> Result<Vec<u8>, Sense> {
    if control == 3 {
        return Err(Sense::NO_SAVING);
    }
    if subpage != 0 && !(subpage == 0xff && page == 0x3f) {
        return Err(Sense::in_cdb(3));
    }
    let pages = pages(info, page, control == 1).ok_or(Sense::in_cdb(2))?;
    let blocks = info.bytes / SECTOR;
    let descriptor = match (no_descriptor, long && long_lba) {
        (true, _) => vec![],
        (false, false) => {
            let mut d = u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes().to_vec();
            d.extend((SECTOR as u32).to_be_bytes());
            d
        }
        (false, true) => {
            let mut d = blocks.to_be_bytes().to_vec();
            d.extend([0; 4]);
            d.extend((SECTOR as u32).to_be_bytes());
            d
        }
    };
    let mut data = if long {
        let len = 6 + descriptor.len() + pages.len();
        let mut header = (len as u16).to_be_bytes().to_vec();
        header.extend([0, DEVICE_SPECIFIC, u8::from(descriptor.len() == 16), 0]);
        header.extend((descriptor.len() as u16).to_be_bytes());
        header
    } else {
        let len = 3 + descriptor.len() + pages.len();
        vec![len as u8, 0, DEVICE_SPECIFIC, descriptor.len() as u8]
    };
    data.extend(descriptor);
    data.extend(pages);
    Ok(data)
}

/// Checks a MODE SELECT parameter list: since nothing can be changed, only the current values are taken.
///
/// # Errors
/// A list that is cut short or asks for a change.
pub fn select(info: &DeviceInfo, long: bool, list: &[u8]) -> Result<(), Sense> {
    if list.is_empty() {
        return Ok(());
    }
    let (header, descriptors) = match long {
        true if list.len() >= 8 => (8, usize::from(u16::from_be_bytes([list[6], list[7]]))),
        false if list.len() >= 4 => (4, usize::from(list[3])),
        _ => return Err(Sense::PARAMETER_LENGTH),
    };
    let mut at = header + descriptors;
    if at > list.len() {
        return Err(Sense::PARAMETER_LENGTH);
    }
    while at < list.len() {
        let number = list[at] & 0x3f;
        let current =
            if number == 0x3f { None } else { pages(info, number, false) }.ok_or(Sense::in_list(at as u16))?;
        let Some(given) = list.get(at..at + current.len()) else { return Err(Sense::PARAMETER_LENGTH) };
        if let Some(wrong) = (1..current.len()).find(|&i| given[i] != current[i]) {
            return Err(Sense::in_list((at + wrong) as u16));
        }
        at += current.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(write_cache: bool) -> DeviceInfo {
        DeviceInfo { id: uuid::Uuid::nil(), name: String::new(), bytes: 1 << 20, chunk: 65536, write_cache }
    }

    #[test]
    fn the_write_cache_is_told() {
        for cache in [false, true] {
            let data = sense(&info(cache), false, true, false, 0, 8, 0).unwrap();
            assert_eq!((data[0], data[2], data[4]), (23, 0x10, 8));
            assert_eq!(data[6] & 4 != 0, cache);
        }
        let data = sense(&info(true), false, true, false, 1, 8, 0).unwrap();
        assert_eq!(data[6], 0, "not changeable");
    }

    #[test]
    fn all_pages_have_consistent_lengths() {
        let six = sense(&info(true), false, false, false, 0, 0x3f, 0).unwrap();
        assert_eq!(usize::from(six[0]) + 1, six.len());
        let ten = sense(&info(true), true, false, true, 0, 0x3f, 0xff).unwrap();
        assert_eq!(usize::from(u16::from_be_bytes([ten[0], ten[1]])) + 2, ten.len());
        assert_eq!(sense(&info(true), false, false, false, 3, 8, 0), Err(Sense::NO_SAVING));
        assert_eq!(sense(&info(true), false, false, false, 0, 2, 0), Err(Sense::in_cdb(2)));
        // What was sensed may be selected again, and nothing else.
        assert_eq!(select(&info(true), false, &six), Ok(()));
        assert_eq!(select(&info(false), false, &six), Err(Sense::in_list(26)));
    }
}
