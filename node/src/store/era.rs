//! Eras of the page cache: which processes of a machine see what the ones before them wrote to a replica's files.
//!
//! An era ends with the boot of the machine, and with every error after which the kernel may have dropped what was
//! written (the file system reports such an error once, to one process). It must not be kept on the disk that failed;
//! so it is a random number in a file below `/run`, which is memory: `/run/md99/<device>-<inode of the meta file>`.
//! Ending the era is deleting that file. Files that were put back from a copy have another inode, and so another era.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Names an era. Zeroes: nothing is known of it, and nothing is to be counted on.
pub type Era = [u8; 16];

/// No era.
pub const UNKNOWN: Era = [0; 16];

/// The machine's boot.
pub(super) static BOOT_ID: LazyLock<Era> = LazyLock::new(|| {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(PATH).map_err(|e| e.to_string());
    match id.and_then(|id| uuid::Uuid::parse_str(id.trim()).map_err(|e| e.to_string())) {
        Ok(id) => id.into_bytes(),
        Err(error) => {
            tracing::warn!(%error, "can't read {PATH}: a killed process loses writes that were not flushed");
            UNKNOWN
        }
    }
});

/// Where eras are noted: `/run` for a service, the user's own part of it for others.
static DIR: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let made = [Some(PathBuf::from("/run")), of_user].into_iter().flatten().map(|dir| dir.join("md99")).find(|dir| {
        // Others may have made it before, for themselves.
        let probe = dir.join(format!(".{}", std::process::id()));
        let made = std::fs::create_dir_all(dir).and_then(|()| std::fs::write(&probe, b""));
        made.and_then(|()| std::fs::remove_file(&probe)).is_ok()
    });
    if made.is_none() {
        tracing::warn!(
            "neither /run/md99 nor $XDG_RUNTIME_DIR/md99 can be made: a killed process loses writes that were not flushed"
        );
    }
    made
});

fn path(key: &str) -> Option<PathBuf> {
    DIR.as_ref().map(|dir| dir.join(key))
}

/// The present era of the files that `key` names; a new one begins if there is none. One process asks at a time: the
/// one that has the files locked.
pub(super) fn present(key: &str) -> Era {
    let (Some(path), true) = (path(key), *BOOT_ID != UNKNOWN) else { return UNKNOWN };
    match read_or_make(&path) {
        // Below `/run` it is the boot's own already, unless that is on a disk.
        Ok(number) => (u128::from_le_bytes(number) ^ u128::from_le_bytes(*BOOT_ID)).to_le_bytes(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a killed process loses writes that were not flushed");
            UNKNOWN
        }
    }
}

fn read_or_make(path: &Path) -> io::Result<Era> {
    match std::fs::read(path) {
        Ok(bytes) if bytes.len() == 16 => return Ok(bytes.try_into().expect("sixteen bytes")),
        // Of a process that was killed while it made the file.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let number = uuid::Uuid::new_v4().into_bytes();
    std::fs::write(path, number)?;
    Ok(number)
}

/// The era is over: what was written may be gone.
pub(super) fn end(key: &str) {
    let Some(path) = path(key) else { return };
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::error!(path = %path.display(), %error, "can't be deleted: what was lost would be counted on");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_era_lasts_until_it_is_ended() {
        let key = format!("test-{}", std::process::id());
        let first = present(&key);
        assert_ne!(first, UNKNOWN, "the machine that runs the tests has a /run");
        assert_eq!(present(&key), first);
        end(&key);
        let second = present(&key);
        assert!(second != first && second != UNKNOWN);
        // A torn file is of nobody.
        std::fs::write(path(&key).expect("there is a directory"), [1; 7]).expect("it is ours");
        let third = present(&key);
        assert!(third != second && third != UNKNOWN);
        end(&key);
    }
}
