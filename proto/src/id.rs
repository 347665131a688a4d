//! Identifiers and quantities. Each is a type of its own, so that an epoch can't be passed for a version.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The sixteen bytes in the order in which they are written and sent.
            pub fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }
            /// The identifier of these sixteen bytes.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                text.parse().map(Self)
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl $name {
            /// The number that follows this one.
            ///
            /// # Panics
            /// When the numbers are used up, which no run reaches.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect(concat!(stringify!($name), " used up")))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

uuid_id!(
    /// One cluster, from `init` on.
    ClusterId
);
uuid_id!(
    /// One volume. Names may be used again, ids never are.
    VolumeId
);
uuid_id!(
    /// One mirror of one volume.
    MirrorId
);
uuid_id!(
    /// One replica: one copy of one mirror on one node.
    ReplicaId
);
number_id!(
    /// A member of the raft group, storage node or witness; from 1.
    NodeId, u64
);
number_id!(
    /// Numbers a volume's sessions: each opening commits a higher one (R1). 0: never opened.
    Epoch, u64
);
number_id!(
    /// Numbers the attaches within one session; from 1 (R1).
    AttachNo, u64
);
number_id!(
    /// Version of a mirror's in-sync set as raft committed it (R2). 0: not committed yet.
    SetVersion, u64
);
number_id!(
    /// Numbers the flushes of one attach; from 1. 0: before the first (R6).
    FlushNo, u64
);
number_id!(
    /// Numbers the cleans of one mirror over all its sessions; 0: none yet (R6).
    CleanNo, u64
);
number_id!(
    /// A random number drawn when a node's process starts: tells a restart from a reconnect (R1).
    Incarnation, u64
);
number_id!(
    /// A 4 KiB block of a mirror or replica.
    BlockIndex, u64
);
number_id!(
    /// A 1 MiB region of a mirror or replica.
    RegionIndex, u32
);

/// The pair that fences: a newer attach ends and drains every older one, and no pair is used twice (R1).
/// Ordered by epoch first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct AttachId {
    /// The session's epoch.
    pub epoch: Epoch,
    /// The attach within that session.
    pub attach: AttachNo,
}

impl fmt::Display for AttachId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.attach)
    }
}
impl fmt::Debug for AttachId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
